"""The CUDA kernels of attention, emulated, against float64; cases are those of Triton's."""

import math

import pytest
import torch
from cuda_checks import all_devices, devices, kernels, use
from kernel_checks import EPS, Random
from test_kernels_attention import (
    CASES,
    LAST,
    Case,
    Last,
    check_attention,
    check_last_attention,
)

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")
# On a T4, 64 channels leave room for 160 keys beside four warps: more keys come in segments.
WIDE = [
    Case(1, 1, d=128, extra=3),
    Case(17, 18, d=128, key_bias="m", shut=5),
    Case(63, 49, 2, 128, key_bias="Bm", batch=2, shut=20, extra=9),
    Case(141, 17, d=48, extra=56),
    Case(197, 63, d=128, sharpness=60.0),
    Case(197, 257, d=64),  # more than sixteen warps of queries: two blocks
    Case(577, 3, d=64, key_bias="Bm", batch=2, shut=400, extra=2),
    Case(577, 17, d=128, key_bias="m"),
    Case(1025, 5, d=64, key_bias="m", shut=800),
    Case(1025, 17, d=128, extra=7),
]


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slim_attention(device, case):
    check_attention(kernels, Random(case.m + case.n), use(device), case)


@all_devices
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_heads_and_many_keys(device, case):
    check_attention(kernels, Random(case.m + case.n), use(device), case)


@devices
@pytest.mark.parametrize("m", [17, 300])
def test_nan_stays_in_its_image(device, m):
    dtype, random = use(device), Random(m)
    q, kv = random(3, 5, 32, dtype=dtype), random(3, m, 64, dtype=dtype)
    wanted = kernels.slim_attention(q, kv, 2)
    kv[1, 3, 7] = math.nan  # a key of the first head
    got = kernels.slim_attention(q, kv, 2)
    assert got[1, :, :16].isnan().all()
    assert torch.equal(got[::2], wanted[::2])


@devices
@pytest.mark.parametrize("case", [*LAST, Last(7, 9, 1024, 64), Last(33, 2, 40, 8)], ids=str)
def test_last_attention(device, case):
    check_last_attention(kernels, Random(case.m + case.queries), use(device), case)


@devices
def test_nan_stays_in_its_image_of_the_last_block(device):
    dtype, random = use(device), Random()
    x, u = random(3, 17, 48, dtype=dtype), random(3, 5, 48, dtype=dtype)
    wanted = kernels.last_attention(x, kernels.row_stats(x), u, 16, eps=EPS)
    x[1, 3, 7] = math.nan
    got = kernels.last_attention(x, kernels.row_stats(x), u, 16, eps=EPS)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], wanted[::2])
