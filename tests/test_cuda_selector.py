"""The CUDA kernels of selectors, emulated; the same checks as Triton's pass."""

import pytest
import torch
from cuda_checks import all_devices, devices, kernels, use
from emulated import A100, T4
from kernel_checks import Random
from test_kernels_selector import (
    CASES,
    HARD,
    Case,
    arguments,
    check_choose,
    check_every_image_by_itself,
    check_infinite,
    check_scores,
    check_tokens,
    inputs,
)

from slimvit.backends.cuda_choosing import MOST_TOKENS
from slimvit.errors import SlimvitError

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_err_no_more_than_torch(device, case):
    check_scores(kernels, case, use(device))


@devices
def test_scores_where_all_heads_count_for_next_to_nothing(device):
    check_scores(kernels, CASES[1], use(device), -128.0)


@all_devices
@pytest.mark.parametrize("case", [Case(33, 9, 2, 24, 2), Case(40, 9, 1, 128)], ids=str)
def test_tokens_on_all_devices(device, case):
    check_tokens(case, use(device), "cuda")


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens(device, case):
    check_tokens(case, use(device), "cuda")


@pytest.mark.parametrize("kind", ["", "ties", "nan", "equal", "far"])
@pytest.mark.parametrize(("batch", "p", "n", "prefix", "packages"), HARD)
def test_choose(batch, p, n, prefix, packages, kind):
    use(T4)
    check_choose(kernels.selector_choose, kind, batch, p, n, prefix, packages)


@devices
def test_every_image_by_itself(device):
    check_every_image_by_itself(use(device), "cuda")


@devices
def test_a_kept_token_does_not_count_in_the_package(device):
    check_infinite(kernels.package_tokens, use(device))


def test_opcheck():
    case = Case(5, 2, 3, 16, 2, 2, 1)
    given = arguments(case, *inputs(case, use(A100))) | {"backend": "cuda"}
    torch.library.opcheck(torch.ops.slimvit.selected_tokens, (), given)


def test_sizes_that_are_refused():
    dtype, random = use(T4), Random()
    x, index, share = random(1, 4, 12, dtype=dtype), torch.tensor([[0, 4]]), random(1, 3)
    many, wide = torch.zeros(1, 1, MOST_TOKENS + 1), Case(5, 2, 1, 16)
    wrong = {
        "width must be a multiple of 8, got 12$": lambda: kernels.package_tokens(
            x, index, share, 1
        ),
        "p must be at most 2048, got 2049$": lambda: kernels.selector_choose(many, many, 5, 1, 0),
        "it computes float16 and bfloat16, not float32": lambda: torch.ops.slimvit.selected_tokens(
            **arguments(wide, *inputs(wide, torch.float32)), backend="cuda"
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(SlimvitError, match=f"^back end cuda: {message}"):
            call()
