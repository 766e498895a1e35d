"""The slimmed model for inference: same call, same outputs as the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from slimvit.checks import dtype_name, whole
from slimvit.dynamic import Planner
from slimvit.errors import SlimvitError, UsageError
from slimvit.masks import Masks
from slimvit.models import SlimmedViT
from slimvit.models.vision_transformer import check_image_shape, refuse_symbols
from slimvit.runtime.graphs import Graph


class AcceleratedViT(nn.Module):
    """A slimmed model for inference. It takes images of any floating dtype and answers in it.

    Attributes:
        masks: the kept sets, or None where a dynamic plan chooses them.
        plan: the dynamic plan, or None.
        backend: the back end that computes.
        image_shape: channels, height and width of the images that the model was made for.
        pretrained_cfg: timm's configuration of the model, from which it resolves the transform.
    """

    def __init__(self, network: nn.Module, backend: str, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = network
        self.masks: Masks | None = getattr(network, "masks", None)
        self.backend = backend
        self.image_shape = image_shape
        self.pretrained_cfg: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
        self._graphs: dict[torch.Size, Graph] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        held = self._graphs and not torch.compiler.is_compiling()
        graph = self._graphs.get(images.shape) if held else None
        by_itself = graph is None or not images.is_cuda or wants_gradient(images)
        if by_itself or torch.cuda.is_current_stream_capturing():
            return self._logits(images).to(images.dtype)
        check_floating(images)
        return graph(images).to(images.dtype)

    def _logits(self, images: Tensor) -> Tensor:
        return self.network(self._cast(images))

    @torch.no_grad()
    def warm_up(self, batch_size: int, *, cuda_graph: bool = False) -> None:
        """Compile and load whatever a batch of this size needs, now rather than at its first call.

        Args:
            batch_size: images, B.
            cuda_graph: hold a CUDA graph for `forward` at this size: its launches then cost the
                processor next to nothing. It takes memory for one batch.

        Raises:
            UsageError: `batch_size` is no whole number or below 1; a CUDA graph is wanted and the
                model is not on a GPU, or images keep numbers of patches of their own.
        """
        batch_size = whole("batch_size", batch_size, 1)
        token = self.network.cls_token
        if cuda_graph:
            check_graph(self.plan, token.device)
        images = token.new_zeros(batch_size, *self.image_shape)
        if cuda_graph:
            self._graphs[images.shape] = Graph(self._logits, images)
            return
        for dtype in {images.dtype, torch.float32}:  # kernels are compiled for each
            self._logits(images.to(dtype))

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        return self.network.forward_features(self._cast(images)).to(images.dtype)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, classes] of features [B, N, D]."""
        out = self.network.forward_head(self._cast(features), pre_logits=pre_logits)
        return out.to(features.dtype)

    def train(self, mode: bool = True) -> AcceleratedViT:
        """Stay in evaluation mode: train what `apply_masks` returns, then accelerate that."""
        return super().train(False)

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        return self.network.num_classes

    @property
    def plan(self) -> Planner | None:
        """The dynamic plan, or None where masks are the same for all images."""
        return getattr(self.network, "plan", None)

    @property
    def num_features(self) -> int:
        """Width of the features, D; timm's `embed_dim` and `head_hidden_size` are the same."""
        return self.network.num_features

    embed_dim = head_hidden_size = num_features

    @property
    def global_pool(self) -> str:
        """What the head reads, by timm's name."""
        return self.network.global_pool

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; of a distilled model both."""
        return self.network.get_classifier()

    forward_intermediates = get_intermediate_layers = SlimmedViT.forward_intermediates
    set_input_size = SlimmedViT.set_input_size

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, C, H, W]: L of [B, n], int64.

        N and more are package tokens, which stand nowhere; -1 fills up the rows of images that keep
        fewer than others.
        """
        check_floating(images)
        if self.masks is None:
            return self.network.kept_sets(self._cast(images))
        check_image_shape(images, self.image_shape)
        return self.masks.places(images)

    @property
    def precision(self) -> str:
        """The dtype that the network computes in, by name; `.to(dtype)` changes it."""
        return dtype_name(self.network.cls_token.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        check_floating(x)
        return x.to(self.network.cls_token.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AcceleratedViT:
        self._graphs.clear()  # they hold the weights where they were
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graphs": {}}

    def extra_repr(self) -> str:  # noqa: D102
        kept = (self.masks or self.plan).counts
        return f"backend={self.backend}, precision={self.precision}, kept={kept}"


def check_graph(plan: Planner | None, device: torch.device) -> None:
    """Refuse a CUDA graph where none can be captured.

    Raises:
        UsageError: images keep numbers of patches of their own, or the device is no GPU.
    """
    if plan is not None and plan.ragged:
        raise UsageError("a CUDA graph needs a plan whose images all keep as many patches")
    if device.type != "cuda":
        raise UsageError(f"a CUDA graph needs the model on a GPU, it is on {device}")


def check_floating(images: Tensor) -> None:
    """Refuse images of integers, which have not been normalised, and such as are not dense."""
    refuse_symbols(images)
    if not isinstance(images, Tensor):
        raise SlimvitError(f"images must be a tensor, got {type(images).__name__}")
    if images.layout is not torch.strided or images.is_nested:
        kind = "nested" if images.is_nested else images.layout
        raise SlimvitError(f"images must be a dense tensor, got {kind}")
    if not images.is_floating_point():
        raise SlimvitError(f"images must be floating point, got {dtype_name(images.dtype)}")


def wants_gradient(images: Tensor) -> bool:
    """Whether images want a gradient, in reverse or in forward mode."""
    if images.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(images).tangent is not None


def refuse_gradients(backend: str, images: Tensor) -> None:
    """Refuse images that want a gradient: kernels have none."""
    if wants_gradient(images):
        raise SlimvitError(
            f"back end {backend} computes no gradients, got images that want one: detach them, or "
            "accelerate with backend='torch'"
        )


def no_state(backend: str) -> str:
    """Why a model of a back end that lays weights out anew loads no state dict."""
    return (
        f"back end {backend} has weights of its own that no state dict holds: load it into the "
        "dense model and accelerate that, or save the whole module"
    )
