"""The shape of a vision transformer, free of any library's classes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """What the rest of slimvit needs to know about a model's shape.

    Attributes:
        name: timm's architecture name, or the class name.
        image_size: height and width in pixels.
        patch_size: height and width of a patch in pixels.
        grid: patches down and across.
        in_chans: channels of the image.
        prefix: class, distillation and register tokens, ahead of the patches.
        head_tokens: leading tokens that the head reads.
        depth: blocks, L.
        width: D.
        heads: H.
        head_dim: d.
        hidden: width of the MLP's hidden layer.
        mlp_macs: multiply–accumulates of the MLP for one token.
        gated: whether attention's output is gated by another projection of the kept tokens.
        num_classes: outputs of each head; 0 if there is none.
    """

    name: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    in_chans: int
    prefix: int
    head_tokens: int
    depth: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    mlp_macs: int
    gated: bool
    num_classes: int

    @property
    def patches(self) -> int:
        """Patches in the image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N: all tokens, prefix included."""
        return self.patches + self.prefix
