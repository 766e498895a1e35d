"""The least time that the kernels of a forward pass can take on a GPU: arithmetic, no GPU.

    for kernel in kernels(spec, masks.counts, masks.alive, 256, 2, "folded"):
        print(kernel.name, H200.seconds(kernel), H200.bound(kernel))

A kernel reads each input once, writes each output once and reads its weights once, all through
device memory. It takes the longer of that and its multiplications at the peak of the matrix units;
softmax, norms, GELU and launches cost nothing. All launches of a kernel count as one, so that one
block's bytes may pass behind another's products. What a cache holds from one kernel to the next is
not deducted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimvit.models import Spec

PLANS = ("separate", "folded", "fused")
FUSED_WIDTH = 256  # the weights' tiles and the rows of one wider MLP exceed a block's shared memory
LONE = 2  # as few kept tokens have the others' keys and values folded away

Part = tuple[str, int, int]  # a launch: its kernel, flops, values read and written


@dataclass(frozen=True)
class Kernel:
    """One kernel and what all its launches in a forward pass do together.

    Attributes:
        name: as in the results; each name occurs once in a plan.
        launches: how often it runs in one forward pass.
        flops: two for each multiply–accumulate of its matrix products, all launches.
        bytes: read from and written to device memory, all launches.
    """

    name: str
    launches: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Chip:
    """A GPU's ceilings: its name, flops and bytes a second."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """The floor: the longer of multiplying at the peak and moving the bytes."""
        return max(kernel.flops / self.flops, kernel.bytes / self.bandwidth)

    def bound(self, kernel: Kernel) -> str:
        """Which of the two it is: `compute` or `memory`."""
        compute = kernel.flops / self.flops >= kernel.bytes / self.bandwidth
        return "compute" if compute else "memory"


# Dense half-precision matrix products and memory, from the vendor's datasheets.
V100 = Chip("V100 SXM2", 125e12, 900e9)
A100 = Chip("A100 SXM 80GB", 312e12, 2039e9)
H200 = Chip("H200", 989e12, 4800e9)
CHIPS = {"v100": V100, "a100": A100, "h200": H200}


def kernels(
    spec: Spec,
    counts: Sequence[int],
    alive: Sequence[int],
    batch: int,
    itemsize: int,
    plan: str,
) -> list[Kernel]:
    """The kernels of one forward pass, in the order in which they first run.

    Args:
        spec: the model's shape.
        counts: n_1 … n_L, the tokens that each block computes.
        alive: n_0 … n_{L-1}, the tokens that each block receives.
        batch: images, B.
        itemsize: bytes of a value, the residual stream and the weights included.
        plan: `separate` (each op a kernel, as in eager PyTorch with SDPA), `folded` (norms folded
            into the products, what is elementwise in their epilogues) or `fused` (projection and
            MLP one kernel besides, up to a width of 256; `folded` beyond).

    Raises:
        ValueError: the plan is unknown, or the model is not a plain ViT.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if spec.gated or spec.mlp_macs != 2 * spec.width * spec.hidden:
        raise ValueError(f"the MLP and attention of {spec.name} are not those of a plain ViT")
    permuted = any(
        spec.prefix < n < spec.tokens for n in counts
    )  # prefix tokens stand first anyway
    parts = [*_embedding(spec, batch, plan, permuted)]
    for n, m in zip(counts, alive, strict=True):
        if plan == "separate":
            parts += _separate_block(spec, batch, n, m)
        elif n <= LONE:
            parts += _last_block(spec, batch, n, m, plan)
        else:
            parts += _block(spec, batch, n, m, plan)
    parts += _head(spec, batch, counts[-1], plan)
    return _merged(parts, itemsize)


def total(launched: Iterable[Kernel], name: str = "whole") -> Kernel:
    """All launches as one; its floor would overlap what the kernels do one after the other."""
    listed = list(launched)
    launches = sum(kernel.launches for kernel in listed)
    return Kernel(name, launches, sum(k.flops for k in listed), sum(k.bytes for k in listed))


def _merged(parts: Iterable[Part], itemsize: int) -> list[Kernel]:
    named: dict[str, list[Kernel]] = {}
    for name, flops, values in parts:
        named.setdefault(name, []).append(Kernel(name, 1, flops, values * itemsize))
    return [total(launched, name) for name, launched in named.items()]


def _product(name: str, rows: int, inputs: int, outputs: int, residual: bool = False) -> Part:
    """[rows, inputs] by weights and a bias, and perhaps the residual stream added."""
    values = rows * inputs + (inputs + 1) * outputs + rows * outputs * (2 if residual else 1)
    return name, 2 * rows * inputs * outputs, values


def _elementwise(name: str, read: int, written: int) -> Part:
    return name, 0, read + written


def _qkv(spec: Spec, rows: int, alive: int) -> Part:
    """Queries of the kept rows, keys and values of those alive, in one launch."""
    width, inner = spec.width, spec.heads * spec.head_dim
    made = (rows + 2 * alive) * inner
    return "qkv", 2 * made * width, alive * width + 3 * inner * (width + 1) + made


def _attention(spec: Spec, batch: int, n: int, m: int) -> Part:
    """Queries, keys and values read, weighted values written; the logits stay on the chip."""
    inner = spec.heads * spec.head_dim
    return "attention", 4 * batch * n * m * inner, 2 * batch * (n + m) * inner


def _separate_block(spec: Spec, batch: int, n: int, m: int) -> Iterator[Part]:
    width, hidden, inner = spec.width, spec.hidden, spec.heads * spec.head_dim
    rows, alive = batch * n, batch * m
    stream = rows * width
    yield _elementwise("ln1", alive * width + 2 * width, alive * width)
    yield _qkv(spec, rows, alive)
    yield _attention(spec, batch, n, m)
    yield _product("proj", rows, inner, width)
    yield _elementwise("add1", 2 * stream, stream)
    yield _elementwise("ln2", stream + 2 * width, stream)
    yield _product("fc1", rows, width, hidden)
    yield _elementwise("gelu", rows * hidden, rows * hidden)
    yield _product("fc2", rows, hidden, width)
    yield _elementwise("add2", 2 * stream, stream)


def _block(spec: Spec, batch: int, n: int, m: int, plan: str) -> Iterator[Part]:
    yield _qkv(spec, batch * n, batch * m)
    yield _attention(spec, batch, n, m)
    yield from _proj_mlp(spec, batch * n, plan)


def _last_block(spec: Spec, batch: int, n: int, m: int, plan: str) -> Iterator[Part]:
    """A lone query's keys and values are never made: q·(W_k y) = (W_kᵀ q)·y, Σ p W_v y = W_v Σ p y.

    A key's bias adds the same to all logits, so softmax forgets it.
    """
    width, inner, rows = spec.width, spec.heads * spec.head_dim, batch * n
    spread = rows * spec.heads * width  # u, and z: a row of D values for each head  # [B, n, H, D]
    yield _product("last_q", rows, width, inner)
    yield "last_u", 2 * rows * inner * width, rows * inner + inner * width + spread
    yield "last_attention", 4 * m * spread, 2 * spread + batch * m * width
    yield "last_v", 2 * rows * inner * width, spread + inner * (width + 1) + rows * inner
    yield from _proj_mlp(spec, rows, plan, "last_")


def _proj_mlp(spec: Spec, rows: int, plan: str, prefix: str = "") -> Iterator[Part]:
    width, hidden, inner = spec.width, spec.hidden, spec.heads * spec.head_dim
    proj = _product(f"{prefix}proj", rows, inner, width, residual=True)
    fc1 = _product(f"{prefix}fc1", rows, width, hidden)
    fc2 = _product(f"{prefix}fc2", rows, hidden, width, residual=True)
    if plan == "folded" or width > FUSED_WIDTH:
        yield from (proj, fc1, fc2)
        return
    # What proj writes is read by fc1 and as fc2's residual; what fc1 writes is read by fc2.
    inside = 3 * rows * width + 2 * rows * hidden
    flops, values = (proj[i] + fc1[i] + fc2[i] for i in (1, 2))
    yield f"{prefix}proj_mlp", flops, values - inside


def _embedding(spec: Spec, batch: int, plan: str, permuted: bool) -> Iterator[Part]:
    """Images by the patch weights; class token and positions added, tokens in lifetime order."""
    width, area = spec.width, spec.patch_size[0] * spec.patch_size[1]
    patches, length = batch * spec.patches, spec.in_chans * area
    name, flops, values = _product("embedding", patches, length, width)
    prefix, positions = spec.prefix * width, spec.tokens * width
    stream = batch * positions
    if plan != "separate":
        yield name, flops, values + positions + batch * prefix
        return
    yield "embedding_conv", flops, values
    yield _elementwise("embedding_cat", patches * width + prefix, stream)
    yield _elementwise("embedding_add", stream + positions, stream)
    if permuted:
        yield _elementwise("embedding_permute", stream, stream)


def _head(spec: Spec, batch: int, n: int, plan: str) -> Iterator[Part]:
    """The last norm, of all rows that are left unless it is folded, and the classifier."""
    if plan == "separate":
        stream = batch * n * spec.width
        yield _elementwise("norm", stream + 2 * spec.width, stream)
    if spec.num_classes:
        yield _product("head", batch * spec.head_tokens, spec.width, spec.num_classes)
