"""The CUDA linear layers, statistics, embedding and scatter, emulated, against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_checks import all_devices, devices, kernels, use
from emulated import A100
from kernel_checks import ACTIVATE, EPS, Random, check_stats, stats_of
from test_kernels_linear import LINEAR, QKV, Linear, Qkv, check_linear, check_qkv, name_of
from test_kernels_mlp import EMBEDDINGS, check_embedding
from torch import Tensor

from slimvit import ops

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")
HALF = A100._replace(dtype=torch.float16)
# Tiles have 32 rows or, for more than 2,048 rows, 128, and 64 columns of 64 inputs.
MORE_QKV = [
    Qkv(1, 33, 31, 192, 192, index=True),
    Qkv(1, 65, 40, 40, 72),
    Qkv(17, 141, 121, 16, 24, index=True),
]
MORE_LINEAR = [
    Linear(1, None, 8, 8, batch=1),
    Linear(33, None, 136, 72, batch=1, norm=True, activation="gelu_tanh", emit=True),
    Linear(129, None, 64, 64, batch=16, norm=True, offset=30.0, activation="gelu"),
    Linear(257, 131, 40, 72, batch=16, residual="index", emit=True, activation="quick_gelu"),
    Linear(130, 129, 72, 40, batch=17, groups=2, index=True),
]


@devices
@pytest.mark.parametrize("case", QKV, ids=name_of)
def test_qkv(device, case):
    check_qkv(kernels, Random(case.m), use(device), case)


@devices
@pytest.mark.parametrize("case", LINEAR, ids=name_of)
def test_linear(device, case):
    check_linear(kernels, Random(case.rows), use(device), case)


@all_devices
@pytest.mark.parametrize("case", MORE_QKV, ids=name_of)
def test_qkv_in_other_tiles(device, case):
    check_qkv(kernels, Random(case.m), use(device), case)


@all_devices
@pytest.mark.parametrize("case", MORE_LINEAR, ids=name_of)
def test_linear_in_other_tiles(device, case):
    check_linear(kernels, Random(case.rows), use(device), case)


class TestSpread:
    """Rows that stand for several tokens, whose spread the norm and the activation mind."""

    @all_devices
    @pytest.mark.parametrize("activation", ACTIVATE)
    @pytest.mark.parametrize(
        "case",
        [
            Linear(1, None, 8, 8, batch=1),
            Linear(63, 40, 136, 72, offset=8.0, index=True),
            Linear(129, None, 40, 64, batch=16),  # more than 2,048 rows
        ],
        ids=name_of,
    )
    def test_errs_no_more_than_torch(self, device, case, activation):
        case = case._replace(norm=True, spread=1.0, activation=activation)
        check_linear(kernels, Random(case.rows), use(device), case)

    @staticmethod
    def inputs(dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, ...]:
        """x, weight, bias, and spreads of all orders, some of them none."""
        random = Random()
        x, spread = random(batch, 7, 64, dtype=dtype), random(batch, 7).square() ** 2 + 0.1
        spread[:, ::3] = 0
        return x, 2 * random.weight(72, 64, dtype), random(72), spread

    @staticmethod
    def call(x: Tensor, weight: Tensor, bias: Tensor, spread: Tensor | None, act: str) -> Tensor:
        sums, squares = weight.float().sum(1), weight.float().square().sum(1)
        given = {"stats": stats_of(x), "row_sums": sums, "eps": EPS, "activation": act}
        if spread is not None:
            given |= {"spread": spread, "squares": squares}
        return kernels.slim_linear(x, weight, bias, **given)[0]

    @devices
    @pytest.mark.parametrize("activation", ACTIVATE)
    @pytest.mark.parametrize("batch", [3, 300])
    def test_none_is_as_without(self, device, batch, activation):
        *given, spread = self.inputs(use(device), batch)
        wanted = self.call(*given, None, activation)
        assert torch.equal(self.call(*given, torch.zeros_like(spread), activation), wanted)
        got = self.call(*given, spread, activation)
        assert torch.equal(got[:, ::3], wanted[:, ::3])
        assert not (got == wanted).all(2)[:, 1::3].any()

    def test_gelu_is_its_mean_over_normal_tokens(self):
        """Over u + sqrt(s) g, in float64 by quadrature."""
        x, weight, bias, spread = self.inputs(use(HALF))
        got = self.call(x, weight, bias, spread, "gelu")
        exact, more = x.double(), spread.double()[..., None]
        rstd = (exact.var(-1, correction=0, keepdim=True) + more + EPS).rsqrt()
        u = (exact - exact.mean(-1, keepdim=True)) * rstd @ weight.double().T + bias.double()
        s = more * rstd.square() * weight.double().square().sum(1)
        assert s.max() > 2
        points, shares = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(60))
        wanted = F.gelu(u[..., None] + s.sqrt()[..., None] * points) @ (shares / shares.sum())
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3)

    @devices
    def test_nan_stays_in_its_rows(self, device):
        *given, spread = self.inputs(use(device))
        wanted = self.call(*given, spread, "gelu")
        spread[1] = torch.nan
        got = self.call(*given, spread, "gelu")
        assert got[1].isnan().all()
        assert torch.equal(got[::2], wanted[::2])


@devices
def test_residual_in_place(device):
    """The result may take the place of the residual where rows are the same."""
    dtype, random = use(device), Random()
    x, residual = random(3, 37, 48, dtype=dtype), random(3, 37, 80, dtype=dtype)
    weight, bias = random.weight(80, 48, dtype), random(80)
    wanted, _ = kernels.slim_linear(x, weight, bias, residual=residual)
    got, _ = kernels.slim_linear(x, weight, bias, residual=residual, out=residual)
    assert got is residual
    assert torch.equal(got, wanted)


@devices
def test_nan_stays_in_its_rows(device):
    dtype, random = use(device), Random()
    x, weight, bias = random(3, 7, 48, dtype=dtype), random.weight(48, 48, dtype), random(48)
    sums, index = weight.float().sum(1), random.index(3, 5, 7)

    def call() -> tuple[torch.Tensor, ...]:
        folded = {"stats": kernels.row_stats(x), "row_sums": sums, "eps": EPS, "emit": True}
        q, kv = kernels.slim_qkv(
            x, folded["stats"], weight, sums, bias, 5, 16, eps=EPS, index=index
        )
        return q, kv, *kernels.slim_linear(x, weight, bias, **folded)

    wanted = call()
    x[1] = torch.nan
    for got, right in zip(call(), wanted):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], right[::2])


@all_devices
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize(
    ("batch", "m", "width"),
    [(1, 1, 8), (1, 1, 16), (3, 7, 48), (1, 17, 64), (3, 5, 80), (2, 9, 320)],
)
def test_row_stats(device, batch, m, width, offset):
    x = (Random(width)(batch, m, width) + offset).to(use(device))
    check_stats(kernels.row_stats(x), x)


@devices
@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_patch_embedding(device, case):
    check_embedding(kernels, Random(case.width), use(device), case)


@devices
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    ("batch", "kept", "length", "width"),
    [(1, 1, 1, 8), (3, 1, 37, 48), (2, 17, 17, 24), (3, 13, 63, 80), (2, 300, 301, 16)],
)
def test_scatter_tokens(device, per_image, batch, kept, length, width):
    dtype, random = use(device), Random(length)
    x = 10 * random(batch, kept, width, dtype=dtype)
    index = random.index(batch if per_image else 1, kept, length)
    index = index if per_image else index[0]
    got = kernels.scatter_tokens(x, index, length)
    assert torch.equal(got, ops.scatter_tokens(x, index, length))
