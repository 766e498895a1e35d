"""The CUDA kernel of a whole block in one launch, emulated, against slim_block in float64."""

import pytest
import torch
from cuda_checks import kernels, use
from emulated import A100, H200, HERE, RTX3090, V100
from fused_blocks import Case, inputs, make, make_parts
from kernel_checks import check, check_stats
from test_fused_block import reference

from slimvit.backends import cuda_block
from slimvit.backends.fused import BlockWeights

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")
HALF = torch.float16
WIDE = {"width": 192, "heads": 3, "head_dim": 64, "hidden": 128}
CASES = [
    Case(1, 1, 1, **WIDE),
    Case(17, 17, **WIDE, act="quick_gelu", biases=False),
    Case(37, 17, 3, **WIDE, index=True, key_bias="Bm", act="gelu_tanh"),
    Case(63, 40, **WIDE, key_bias="m", zero_rows=134),
    Case(97, 33, **WIDE, idle=True),
    Case(99, 97, 1, **WIDE, index=True),  # an A100 has room for one tile of a weight
    Case(141, 131, 1, **WIDE, index=True, zero_rows=3),  # nine warps; no A100 has room
]
TWO_SIDES = {"width": 384, "heads": 6, "head_dim": 64, "hidden": 128}  # two warps to sixteen rows
WIDER = [
    Case(1, 1, 1, **TWO_SIDES),
    Case(19, 7, 3, **TWO_SIDES, index=True, key_bias="Bm", act="gelu_tanh"),
    Case(33, 33, 1, **TWO_SIDES, zero_rows=163, biases=False),
    Case(48, 33, **TWO_SIDES, key_bias="m", idle=True),  # room for one tile of a weight
    Case(63, 61, 1, **TWO_SIDES, index=True, act="quick_gelu"),  # no A100 has room
]


def answer(device, case):
    dtype = use(device)
    block, parts = make(case, dtype, backend="cuda"), make_parts(case, dtype)
    x, keep, key_bias = inputs(case, dtype)
    part = BlockWeights(*(block._buffers[name] for name in BlockWeights._fields))
    out = x.clone() if case.idle else None
    answered = kernels.fused_block(
        *(x, part, case.n, case.heads, block.activation, block.eps, key_bias, case.zero_rows),
        index=keep if case.index else None,
        out=out,
    )
    return answered, lambda *given: reference(case, parts, keep, *given), (x, key_bias)


@pytest.mark.parametrize(
    ("device", "case"),
    [
        *((A100._replace(dtype=HALF), case) for case in CASES[:-1] + WIDER[:-1]),
        *((H200, case) for case in CASES + WIDER),
        *((HERE, case) for case in CASES + WIDER),
    ],
    ids=str,
)
def test_errs_no_more_than_torch(device, case):
    answered, formula, given = answer(device, case)
    if device == HERE and answered is None:
        pytest.skip("this GPU has no room for such a block")
    assert answered is not None
    got, stats = answered
    check(got, formula, *given)
    check_stats(stats[:, : case.n], got[:, : case.n])


@pytest.mark.parametrize(
    ("device", "case"),
    [
        (V100, CASES[0]),  # for the newer cores
        (A100, CASES[-1]),  # too many tokens for its shared memory
        (A100, CASES[0]._replace(width=128, heads=2)),
        (A100, CASES[0]._replace(width=256)),
        (A100, CASES[0]._replace(hidden=80)),
        (H200, CASES[0]._replace(head_dim=32)),
        (RTX3090, CASES[-2]),
        (H200, CASES[0]._replace(m=197, n=193)),
        (A100, WIDER[-1]),
        (H200, WIDER[0]._replace(m=70, n=65)),
        (RTX3090, WIDER[2]),
    ],
    ids=str,
)
def test_other_blocks_are_left_to_the_other_kernels(device, case):
    answered, _, _ = answer(device, case)
    assert answered is None


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_the_op_takes_it_where_it_pays(case, monkeypatch):
    use(H200)
    (wanted, wanted_stats), _, (x, key_bias) = answer(H200, case)
    block = make(case, H200.dtype, backend="cuda")
    keep = inputs(case, H200.dtype)[1]
    monkeypatch.setattr(kernels, "whole_block", kernels.fused_block)
    got, stats = block(x, keep, key_bias=key_bias, idle=case.idle)
    assert torch.equal(got, wanted)
    assert torch.equal(stats[:, : case.n], wanted_stats[:, : case.n])


def test_few_images_are_left_to_the_other_kernels():
    use(H200)
    block, x = make(CASES[0], H200.dtype, backend="cuda"), inputs(CASES[0], H200.dtype)[0]
    part = BlockWeights(*(block._buffers[name] for name in BlockWeights._fields))
    given = x, part, 1, 3, "gelu", block.eps, None, 0, None, None
    assert kernels.whole_block(*given) is None


@pytest.mark.parametrize(
    "batch, pays",
    [(0, False), (64, False), (131, False), (132, True), (133, False), (197, False), (198, True)]
    + [(256, True), (264, True), (265, False), (297, True), (1024, True), (1025, True)],
)
def test_a_whole_block_is_taken_where_the_last_turn_is_busy_too(batch, pays):
    assert cuda_block.pays(batch, 132) == pays
