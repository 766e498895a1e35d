"""Networks with random weights, as every GPU benchmark runs them, and images for them."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from gpu_roofline import resized
from torch import Tensor, nn

from slimvit import Masks, models
from slimvit.bench import parse_keep
from slimvit.models import Spec

FORMS = ("dense", "slim")


@dataclass(frozen=True)
class Network:
    """A model with random weights, and what it keeps.

    Attributes:
        model: timm's name.
        image_size: in pixels.
        keep: kept counts at the model's own size; at another, the same fractions of its patches.
        device: where it runs.
    """

    model: str
    image_size: int
    keep: str
    device: str

    @functools.cache  # noqa: B019  a handful of networks, for as long as the process lives
    def shapes(self) -> tuple[Spec, dict[str, Masks]]:
        """The model's shape, and its masks, `dense` ones keeping everything."""
        own = shape = shape_of(self.model, None)
        counts = parse_keep(self.keep)
        if self.image_size != own.image_size[0]:
            shape = shape_of(self.model, self.image_size)
            counts = resized(own, counts, self.image_size)[1]
        slim = Masks.from_counts(counts, shape.grid, shape.prefix)
        dense = Masks.dense(shape.depth, shape.grid, shape.prefix)
        return shape, {"dense": dense, "slim": slim}

    def build(self) -> tuple[nn.Module, Spec, dict[str, Masks]]:
        """The model in float32 with random weights, always the same, its shape and its masks."""
        torch.manual_seed(0)
        shape, masks = self.shapes()
        model = randomised(models.create(self.model, img_size=self.image_size))
        return model.to(self.device), shape, masks


def shape_of(model: str, image_size: int | None) -> Spec:
    """The shape of a timm model, built without data where timm can."""
    try:
        with torch.device("meta"):
            return models.spec(models.create(model, img_size=image_size))
    except (RuntimeError, NotImplementedError):  # it reads a value while it builds
        return models.spec(models.create(model, img_size=image_size))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Noise on what timm makes zero or one: biases, norms and tokens; so that no term is idle."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "token" in name or "pos_embed" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_images(shape: Spec, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random images on which models differ: coarse blobs with fine noise; see `sample_images`."""
    coarse = torch.randn(batch, shape.in_chans, 7, 7, device=device)
    blobs = nn.functional.interpolate(coarse, size=shape.image_size, mode="bicubic")
    return (blobs + 0.2 * torch.randn_like(blobs)).to(dtype)


def quiet() -> None:
    """References in full float32, and no warnings of kernels that have no deterministic form."""
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message=".*deterministic.*")
