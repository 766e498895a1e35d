"""No speed without a right answer: every row's logits against the float32 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.errors import MismatchError
from slimvit.export import relative_error

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative error of an image's logits, by the precision that computed them.

PyTorch's own error is 1e-6 in float32 on CPUs (TF32 convolutions on GPUs cost 1e-4), and 1 to 2 %
in bfloat16; a model that keeps the wrong tokens, or all of them, is some 20 % off on the images
that `sample_images` makes.
"""


def verify(runtime: str, pruned: bool, precision: str, got: Tensor, wanted: Tensor) -> float:
    """The relative error of `got` [B, classes] to the reference's logits.

    Raises:
        MismatchError: it is beyond the precision's tolerance; the row must not be timed.
    """
    error = relative_error(got.detach().to("cpu", torch.float32), wanted)
    tolerance = TOLERANCES[precision]
    if not error <= tolerance:
        raise MismatchError(
            f"{runtime} ({'pruned' if pruned else 'dense'}, {precision}) is not timed: its logits "
            f"are {error:.2g} off the float32 reference, more than {tolerance:g}"
        )
    return error
