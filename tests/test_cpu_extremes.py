"""The C++ block where activations and softmax meet their ends, and how its files are linked."""

import functools
import math
import shutil
import subprocess
from pathlib import Path

import builds
import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import ACTIVATIONS, build, off, random_images, sharpened
from test_cpu_block import FLOOR, Case, cast, make_parts
from test_cpu_choice import Choosing, call, input_of
from test_cpu_vit import PRECISIONS
from torch import Tensor

from slimvit import DPS, Absorb, Masks, SPViT
from slimvit.ops import Alive, BlockParts, FoldedBlock, dynamic_block, pack_block, slim_block
from slimvit.runtime import accelerate, apply_masks

CSRC = Path(__file__).parent.parent / "csrc"
FAR = [-1e30, -1e6, -3000, -100, -30, -6, -5.6, -5.4, -4.6, -4.4, 4.4, 4.6, 5.6, 100, 1e6, 1e30]
PLANS = {
    "masks": lambda: Masks.dense(3, (4, 4), 1),
    "attention": lambda: Absorb(counts=[12, 7, 1]),
    "predictors": lambda: DPS([12, 7, 1]),
    "selectors": lambda: SPViT((0.5,), stages=(1,)),
}


@torch.no_grad()
def mlp_of(act: str, hidden: Tensor) -> BlockParts:
    """A block that answers act(hidden) to zeros."""
    width = len(hidden)
    parts = make_parts(Case(4, 4, 1, width, 1, 16, width, act))
    fc1, _, fc2 = parts.mlp
    for own in (parts.proj, parts.norm2, fc1, fc2):
        own.weight.zero_()
        own.bias.zero_()
    fc1.bias.copy_(hidden)
    fc2.weight.copy_(torch.eye(width))
    return parts


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_far_from_zero(act, dtype):
    hidden = torch.tensor(FAR, dtype=torch.float32)
    pack = pack_block(FoldedBlock(mlp_of(act, hidden)), None, dtype)
    got = torch.ops.slimvit.slim_block(torch.zeros(4, 1, 16), pack, 4)[0, 0]
    wanted = ACTIVATIONS[act]()(hidden.double())
    slack, rounding = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (5e-4, 4e-3)}[dtype]
    assert ((got - wanted).abs() <= slack + rounding * wanted.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_wherever_they_bend(isa, act, dtype):  # noqa: F811
    """What is rounded is off by what no sum sees, and small answers are off by little of them."""
    hidden = torch.cat([torch.linspace(-8, 8, 1009), torch.logspace(-6, -1, 15)])
    pack = pack_block(FoldedBlock(mlp_of(act, hidden)), None, dtype)
    got = torch.ops.slimvit.slim_block(torch.zeros(4, 1, 1024), pack, 4)[0, 0]
    wanted = ACTIVATIONS[act]()(hidden.double())
    slack, share = {torch.float32: (6e-7, 5e-7), torch.bfloat16: (7e-5, 5e-4)}[dtype]
    if act == "gelu" and isa in ("avx512", "avx512_bf16", "amx"):  # from a table
        slack, share = {torch.float32: (5e-8, 3e-7), torch.bfloat16: (1.5e-5, 3e-5)}[dtype]
    around = torch.where(hidden.abs() < 0.07, share * wanted.abs(), slack)
    assert (got >= (wanted - around).to(dtype)).all()
    assert (got <= (wanted + around).to(dtype)).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bias", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_every_key_is_masked_all_weigh_the_same(dtype, n, bias):
    case = Case(63, n, 2, lone=n == 1)
    parts = cast(make_parts(case), dtype)
    x = torch.randn(63, 2, 64).to(dtype).float()
    pack = pack_block(FoldedBlock(parts), None, dtype, case.lone)
    got = torch.ops.slimvit.slim_block(x, pack, n, None, torch.full((63,), bias))
    exact = cast(parts, torch.float64)
    with torch.no_grad():
        exact.qkv.weight[: len(exact.qkv.weight) // 3] = 0  # queries that see no difference
        exact.qkv.bias[: len(exact.qkv.weight) // 3] = 0
        wanted = slim_block(x.double(), exact, n)
    assert off(got, wanted) <= 2 * FLOOR[dtype]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("plan", PLANS)
def test_rows_of_hardly_any_variance(plan):
    """Of 1e-40, which one divided by is more than float32 holds; its root is not."""
    model = build("deit")
    for block in model.blocks:
        block.norm1.eps = block.norm2.eps = 0.0
    for start in (model.cls_token, model.pos_embed, *model.patch_embed.parameters()):
        start.data *= 1e-20
    images = random_images(model, 3)
    got = accelerate(model, PLANS[plan](), backend="cpu", precision="float32")(images)
    with torch.no_grad():
        wanted = apply_masks(model.double(), PLANS[plan]()).eval()(images.double())
    assert off(got, wanted) < 1e-3  # float32 holds 1e-40 itself to 1e-5


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sharpness", [100, 300, 1000])
def test_patches_that_nothing_reads_go_by_position(sharpness):
    model, images = sharpened("deit", sharpness), random_images(build("deit"), 8)
    plan = Absorb(counts=[12, 7, 1])
    got, wanted = (
        accelerate(model, plan, backend=backend, precision="float32").kept_sets(images)
        for backend in ("cpu", "torch")
    )
    assert all(map(torch.equal, got, wanted))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_twins_that_do_not_matter_go_by_position(dtype):
    """Cosines of some are above one and their scores -0, which is no less than 0."""
    case = Choosing(63, 40, prefix=2, sizes=False)
    parts = make_parts(case.block)
    for parameter in parts.qkv.parameters():
        parameter.chunk(3)[2].zero_()  # values
    x, _, _ = input_of(case, dtype)
    x[3:32:2] = x[2:32:2]
    _, index, *_ = call(case, dtype, x=x, pack=pack_block(FoldedBlock(parts), None, dtype))
    assert torch.equal(index, torch.arange(40).expand(3, -1))


@pytest.mark.usefixtures("isa")
def test_patches_that_the_norm_makes_zeros_of_are_like_none():
    case = Choosing(63, 40, prefix=2)
    parts = make_parts(case.block)
    parts.norm1.bias.data.zero_()
    x, size, spread = input_of(case, torch.float32)
    x[32:] = 1
    _, index, *_ = call(case, torch.float32, x=x, pack=pack_block(FoldedBlock(parts)))
    alive = Alive(x.double(), torch.arange(63).expand(3, -1), size, spread=spread)
    choose = functools.partial(Absorb(counts=[1]).choose, 0)
    with torch.no_grad():
        exact = dynamic_block(alive, cast(parts, torch.float64), case.n, choose, prefix=2)
    assert torch.equal(index, exact.place)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("level", [1e20, -1e30])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_too_large_for_a_variance_is_nan(dtype, plan, level):
    """Not an answer that all such images share; and the others of its batch have their own."""
    model = build("deit")
    fast = accelerate(model, PLANS[plan](), backend="cpu", precision=PRECISIONS[dtype])
    images = random_images(model, 5)
    features, logits = fast.forward_features(images), fast(images)
    images[3] *= level
    got = fast.forward_features(images), fast(images)
    others = [0, 1, 2, 4]
    assert got[0][3].isnan().any()
    assert got[1][3].isnan().all()
    assert torch.equal(got[0][others], features[others])
    assert torch.equal(got[1][others], logits[others])


def test_no_function_is_shared_between_instruction_sets(tmp_path):
    """The linker would keep one, whatever processor it was compiled for."""
    reason = builds.why_not() or (None if shutil.which("nm") else "nm was not found")
    if reason is not None:
        pytest.skip(reason)
    compiled = tmp_path / "isa_portable.o"
    source = CSRC / "cpu" / "isa_portable.cpp"
    command = [builds.find("g++"), "-std=c++17", "-O0", "-fPIC", f"-I{CSRC}", "-c", str(source)]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    listed = subprocess.run(["nm", "-C", str(compiled)], check=True, capture_output=True, text=True)
    assert "slimvit::" in listed.stdout
    assert [line for line in listed.stdout.splitlines() if " W " in line] == []
