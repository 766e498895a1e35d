"""The C++ kernels: weights packed into plain byte tensors, and the calls that take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimvit import _extensions
from slimvit.backends.cpu_module import (
    DTYPES,
    address,
    call,
    make_pack,
    module,
    on_cpu,
    pack_bytes,
    require,
    threads,
)
from slimvit.checks import dtype_name

_HUGE_PAGE = 2 << 20


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on a device, or None if they can."""
    reason = _extensions.why_not("_cpu")
    if reason is not None:
        return reason
    if torch.device(device).type != "cpu":
        return f"it computes on CPUs, not on {torch.device(device).type}"
    if dtype not in DTYPES:
        return not_on_cpus(dtype)
    try:
        module().chosen()
    except ValueError as error:  # SLIMVIT_ISA
        return str(error)
    return None


def not_on_cpus(dtype: torch.dtype) -> str:
    """The reason why a model does not run in `dtype` on a CPU."""
    return f"{dtype_name(dtype)} is not computed on CPUs: use float32 or bfloat16"


def pack_block(
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    heads: int,
    head_dim: int,
    activation: str,
    eps: tuple[float, float],
    extra_bias: float = 0.0,
    lone: bool = False,
) -> Tensor:
    """One block's weights as the kernels of the chosen instruction set read them.

    Args:
        weights: weight and bias of norm1 [D], qkv [3·H·d, D], proj [D, H·d], norm2 [D],
            fc1 [hidden, D] and fc2 [D, hidden], then key and value [H·d] of the extra key; None
            where there is none.
        dtype: what the block computes in, float32 or bfloat16.
        heads: H.
        head_dim: d, a multiple of 16, as are D and hidden.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        eps: of norm1 and norm2.
        extra_bias: logit bias of the extra key.
        lone: also lay out what a call for one or two kept tokens uses instead of the others' keys
            and values.

    Returns:
        uint8, one-dimensional.

    Raises:
        SlimvitError: a shape that the kernels do not take.
    """
    hidden, width = weights[8].shape
    options = {
        "width": width,
        "heads": heads,
        "head_dim": head_dim,
        "hidden": hidden,
        "activation": activation,
        "eps1": eps[0],
        "eps2": eps[1],
        "extra_bias": extra_bias,
        "lone": lone,
    }
    return make_pack(module().pack_block, options, weights, dtype)


def pack_embedding(
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    dtype: torch.dtype,
    *,
    image_size: tuple[int, int],
    prefix: int,
) -> Tensor:
    """The patch embedding as the kernels read it.

    Args:
        weight: [D, C, ph, pw].
        table: what each token starts from, bias and position included, in lifetime order, [N, D].
        order: which token comes where in lifetime order, [N], integers.
        norm: weight, bias and eps of the norm after it, or None.
        dtype: what it computes in, float32 or bfloat16.
        image_size: height and width in pixels.
        prefix: class, distillation and register tokens, ahead of the patches.

    Returns:
        uint8, one-dimensional.

    Raises:
        SlimvitError: a shape that the kernels do not take.
    """
    width, channels, patch_height, patch_width = weight.shape
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    options = {
        "channels": channels,
        "image_height": image_size[0],
        "image_width": image_size[1],
        "patch_height": patch_height,
        "patch_width": patch_width,
        "tokens": table.shape[0],
        "prefix": prefix,
        "width": width,
        "eps": eps,
    }
    arrays = (weight, table, order.to(torch.int32), norm_weight, norm_bias)
    return make_pack(module().pack_embedding, options, arrays, dtype)


def pack_head(
    norm: tuple[Tensor, Tensor, float] | None,
    linears: Sequence[tuple[Tensor, Tensor | None]],
    dtype: torch.dtype,
    *,
    width: int,
) -> Tensor:
    """The final norm and the heads, whose logits are averaged, as the kernels read them.

    Args:
        norm: weight, bias and eps, or None.
        linears: weight [classes, D] and bias [classes] of each head: none, one, or two.
        dtype: what it computes in, float32 or bfloat16.
        width: D.

    Returns:
        uint8, one-dimensional.
    """
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    classes = linears[0][0].shape[0] if linears else 0
    heads = [*linears, (None, None), (None, None)][:2]
    arrays = (norm_weight, norm_bias, *heads[0], *heads[1])
    options = {"width": width, "classes": classes, "heads": len(linears), "eps": eps}
    return make_pack(module().pack_head, options, arrays, dtype)


def join(packs: Sequence[Tensor]) -> Tensor:
    """The same packs one after the other, uint8, in huge pages where the system has them.

    A network reads its weights from end to end for every image, and small pages cost time.
    """
    size = sum(pack.numel() for pack in packs)
    room = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % _HUGE_PAGE
    module().prefer_huge_pages(address(room), room.numel())
    return torch.cat(list(packs), out=room[start : start + size])


def slim_block(
    x: Tensor, pack: Tensor, n: int, index: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """The kept rows [n, B, D] after a packed block, of the alive tokens x [m, B, D]; float32.

    `index` [B, n], int64, names the kept rows, None the first n; `key_bias` is [m] or [B, m].
    """
    require(
        x.dim() == 3 and x.dtype == torch.float32 and on_cpu(x), "x must be [m, B, D], float32", x
    )
    m, batch, width = x.shape
    if index is not None:
        rule = f"index must be [B, n] = [{batch}, {n}], int64"
        fits = index.shape == (batch, n) and index.dtype == torch.int64
        require(fits and on_cpu(index), rule, index)
        index = index.contiguous()
    if key_bias is not None:
        rule = f"key_bias must be [m] = [{m}] or [B, m] = [{batch}, {m}], floating point"
        fits = key_bias.shape in ((m,), (batch, m)) and key_bias.is_floating_point()
        require(fits and on_cpu(key_bias), rule, key_bias)
        key_bias = key_bias.float().contiguous()
    x = x if x.stride(2) == 1 else x.contiguous()
    bias_image = m if key_bias is not None and key_bias.dim() == 2 else 0
    require(n >= 1 and (n <= m or index is not None), f"n must be in [1, m] = [1, {m}]", n)
    out = x.new_empty(n, batch, width)
    call(
        module().slim_block,
        *pack_bytes("pack", pack),
        *(address(x), x.stride(1), x.stride(0)),
        *(address(out), out.stride(1), out.stride(0)),
        *(address(index), address(key_bias), bias_image),
        *(width, batch, m, n, threads()),
    )
    return out


def slim_vit(
    images: Tensor,
    packs: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    idle: bool,
    rows: int,
    columns: int,
) -> Tensor:
    """Images [B, C, H, W], float32 or bfloat16, through a packed network, to float32.

    `packs` are the embedding, the blocks and the head one after the other, of that many bytes.
    Returns logits [B, columns] where `rows` is 0, else tokens after the final norm,
    [B, rows, columns].
    """
    return run_network(images, packs, (sizes, counts, idle, rows, columns))


def run_network(
    images: Tensor,
    packs: Tensor,
    shape: tuple[Sequence[int], Sequence[int], bool, int, int],
    kept: Tensor | None = None,
) -> Tensor:
    """`slim_vit`, and with room for what choosers keep `cpu_dynamic.dynamic_vit`."""
    fits = images.dim() == 4 and images.dtype in DTYPES and on_cpu(images)
    require(fits, "images must be [B, C, H, W], float32 or bfloat16", images)
    images = images.contiguous()
    rows, columns = shape[-2:]
    sides = (images.shape[0], rows, columns) if rows else (images.shape[0], columns)
    out = torch.empty(sides, dtype=torch.float32, device="cpu")
    call(
        module().slim_vit,
        *pack_bytes("packs", packs),
        *shape,
        *(address(images), DTYPES[images.dtype], images.shape[1:]),
        *(address(out), images.shape[0], threads()),
        address(kept),
    )
    return out


def peak(dtype: torch.dtype) -> float:
    """Measured peak of one thread at products in `dtype`, floating-point operations per second."""
    return call(module().peak, DTYPES[dtype])
