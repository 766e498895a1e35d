"""The floor on GPUs: what its kernels add up to, by hand and by slimvit.macs."""

import csv
import importlib
from pathlib import Path

import pytest

from slimvit import Masks
from slimvit.macs import cut, gmacs
from slimvit.models import Spec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PLANS = ("separate", "folded", "fused")
KEEP = (141, 141, 131, 121, *(111,) * 7, 1)
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def deit(size):
    width, heads = SIZES[size]
    return Spec(
        name=f"deit_{size}_patch16_224",
        image_size=(224, 224),
        patch_size=(16, 16),
        grid=(14, 14),
        in_chans=3,
        prefix=1,
        head_tokens=1,
        depth=12,
        width=width,
        heads=heads,
        head_dim=64,
        hidden=4 * width,
        mlp_macs=8 * width**2,
        gated=False,
        num_classes=1000,
    )


@pytest.fixture(scope="module")
def floor():
    """benchmarks/gpu_floor.py; its folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("gpu_floor")


@pytest.fixture(scope="module")
def roofline(floor):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("gpu_roofline")


def slim(floor, spec, plan, batch=8):
    masks = Masks.from_counts(KEEP, spec.grid)
    return floor.kernels(spec, masks.counts, masks.alive, batch, 2, plan)


def dense(floor, spec, plan, batch=8):
    full = (spec.tokens,) * spec.depth
    return floor.kernels(spec, full, full, batch, 2, plan)


def macs(floor, kernels):
    return floor.total(kernels).flops / 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_flops_are_twice_the_counted_macs(floor, size, plan):
    spec = deit(size)
    assert macs(floor, dense(floor, spec, plan)) == pytest.approx(8e9 * gmacs(spec), rel=1e-12)
    width, inner, m = spec.width, spec.heads * 64, KEEP[-2]
    made = 2 * m * width * inner + 2 * m * inner  # keys, values and attention of the last block
    folded = 2 * width * inner + 2 * m * spec.heads * width
    expected = 1e9 * gmacs(spec, Masks.from_counts(KEEP, spec.grid))
    if plan != "separate":
        expected += folded - made
    assert macs(floor, slim(floor, spec, plan)) == pytest.approx(8 * expected, rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [dense, slim])
def test_each_plan_moves_fewer_bytes_in_fewer_launches(floor, size, count):
    separate, folded, fused = (count(floor, deit(size), plan) for plan in PLANS)
    wholes = [floor.total(plan) for plan in (separate, folded, fused)]
    assert wholes[2].bytes <= wholes[1].bytes < wholes[0].bytes
    assert wholes[2].launches <= wholes[1].launches < wholes[0].launches
    assert (fused != folded) == (size == "tiny")


def test_names_and_launches(floor):
    names = {k.name: k.launches for k in slim(floor, deit("tiny"), "fused")}
    last = ("last_q", "last_u", "last_attention", "last_v", "last_proj_mlp")
    repeated = dict.fromkeys(("qkv", "attention", "proj_mlp"), 11)
    assert names == {"embedding": 1, **repeated, **dict.fromkeys(last, 1), "head": 1}
    assert floor.total(slim(floor, deit("tiny"), "separate")).launches == 4 + 12 * 10 + 2
    assert floor.total(dense(floor, deit("tiny"), "separate")).launches == 3 + 12 * 10 + 2


def test_bytes_by_hand(floor):
    spec = deit("tiny")
    by_name = {k.name: k for k in dense(floor, spec, "folded", batch=2)}
    rows, width, hidden = 2 * 197, 192, 768
    read = rows * hidden + hidden * width + width + rows * width  # input, weights, bias, residual
    assert by_name["fc2"].bytes == 12 * 2 * (read + rows * width)
    assert by_name["fc2"].flops == 12 * 2 * rows * hidden * width
    assert by_name["attention"].bytes == 12 * 2 * 4 * rows * width
    fused = {k.name: k for k in dense(floor, spec, "fused", batch=2)}["proj_mlp"]
    weights = width * width + 2 * width * hidden + 2 * width + hidden
    assert fused.bytes == 12 * 2 * (3 * rows * width + weights)
    last = {k.name: k for k in slim(floor, spec, "folded", batch=2)}["last_attention"]
    assert last.bytes == 2 * 2 * (111 * width + 2 * 3 * width)  # x once, u read, z written


def test_a_floor_is_the_longer_of_products_and_bytes(floor):
    chip = floor.Chip("chip", 100.0, 10.0)
    multiplies, moves = floor.Kernel("a", 1, 1000, 50), floor.Kernel("b", 1, 400, 50)
    assert (chip.seconds(multiplies), chip.bound(multiplies)) == (10.0, "compute")
    assert (chip.seconds(moves), chip.bound(moves)) == (5.0, "memory")


def test_slim_over_dense_is_the_ratio_of_macs_where_memory_is_free(floor, roofline):
    spec, chip = deit("small"), floor.Chip("chip", 1e12, 1e30)
    times = [roofline.seconds(chip, count(floor, spec, "separate")) for count in (dense, slim)]
    ideal = 1 / (1 - cut(spec, Masks.from_counts(KEEP, spec.grid)))
    assert times[0] / times[1] == pytest.approx(ideal, rel=1e-9)


def test_what_is_no_plain_vit_is_refused(floor):
    spec = Spec(**{**vars(deit("tiny")), "gated": True})
    with pytest.raises(ValueError, match="not those of a plain ViT"):
        floor.kernels(spec, (197,), (197,), 1, 2, "folded")
    with pytest.raises(ValueError, match="plan must be one of"):
        floor.kernels(deit("tiny"), (197,), (197,), 1, 2, "other")


def test_kept_patches_scale_with_the_image(roofline):
    large, counts = roofline.resized(deit("tiny"), KEEP, 384)
    assert large.tokens == 577
    assert counts[:2] == [412, 412]
    assert counts[-1] == 1


def run(roofline, folder, capsys, *options):
    """What the command prints, and its rows."""
    command = ["--models", "deit_tiny_patch16_224", "--measured", str(folder / "gpu-kernels.csv")]
    roofline.main([*command, *options, "--output", str(folder / "new" / "floor.csv")])
    with (folder / "new" / "floor.csv").open(newline="") as file:
        return capsys.readouterr().out, list(csv.DictReader(file))


def test_the_command_writes_floors_and_says_what_is_not_measured(roofline, floor, tmp_path, capsys):
    out, rows = run(roofline, tmp_path, capsys, "--ceilings", "h200=788,4300", "--batch", "64")
    assert "not measured" in out
    assert {row["chip"] for row in rows} == {chip.name for chip in floor.CHIPS.values()}
    wholes = [row for row in rows if row["kernel"] == "whole"]
    assert len(wholes) == 3 * 2 * 3
    parts = dict.fromkeys({(r["chip"], r["plan"], r["kept"]) for r in rows}, 0.0)
    for row in rows:
        peak, memory = float(row["peak_tflops"]), float(row["peak_gbytes"])
        longer = max(1e3 * float(row["gflop"]) / peak, 1e3 * float(row["mbytes"]) / memory)
        if row["kernel"] != "whole":
            assert float(row["microseconds"]) == pytest.approx(longer, abs=0.01)
            parts[row["chip"], row["plan"], row["kept"]] += float(row["microseconds"])
    for row in wholes:
        whole = parts[row["chip"], row["plan"], row["kept"]]
        assert float(row["microseconds"]) == pytest.approx(whole, abs=0.2)
    assert {row["peak_tflops"] for row in rows if row["chip"] == "H200"} == {"788"}


def test_measured_kernels_stand_beside_their_floor(roofline, tmp_path, capsys):
    (tmp_path / "gpu-kernels.csv").write_text(
        "device,model,kernel,batch,precision,microseconds\n"
        "NVIDIA H200,deit_tiny_patch16_224,proj_mlp,256,float16,450.3\n"
        "NVIDIA H200,deit_tiny_patch16_224,qkv,256,float32,999.9\n"
    )
    out, _ = run(roofline, tmp_path, capsys, "--chips", "h200")
    (fused,) = (line for line in out.splitlines() if line.startswith("| proj_mlp"))
    assert fused.endswith("| 225.2, compute | 450.3 (50 %) |")
    (other,) = (line for line in out.splitlines() if line.startswith("| qkv"))
    assert other.endswith("not measured |")


def test_bad_ceilings_are_refused(roofline, capsys):
    with pytest.raises(SystemExit) as stop:
        roofline.main(["--ceilings", "h2=788,4300"])
    assert stop.value.code == 2
    assert "--ceilings takes h200=788,4300 (v100, a100, h200), got 'h2=" in capsys.readouterr().err
