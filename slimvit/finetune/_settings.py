"""How to fine-tune: the numbers, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimvit.checks import number, one_of, whole
from slimvit.errors import UsageError

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}

_MOST_SEED = 2**32 - 1  # NumPy's
_WHOLE = ("epochs", "seed", "frozen_epochs")
_POSITIVE = ("lr", "temperature")
_NOT_NEGATIVE = (
    "weight_decay", "warmup_epochs", "min_lr", "clip",
    "keep_weight", "class_weight", "token_weight", "backbone_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Numbers of a fine-tuning run.

    The defaults suit a few hundred images: on 250, DeiT-Ti at 46 % fewer MACs moves away from the
    dense model on other images at a learning rate of 1e-4, and after some ten epochs at 1e-5.

    Attributes:
        epochs: passes over the images; 0 changes nothing.
        lr: learning rate at its highest.
        weight_decay: AdamW's.
        warmup_epochs: epochs of linear warm-up, part of `epochs`, half of them at most; may be a
            fraction.
        min_lr: where the cosine ends, as a fraction of `lr`.
        temperature: of the distillation.
        alpha: weight of the labels, in [0, 1]; the dense model's answers have the rest.
        clip: largest norm of the gradient; 0 for no clipping.
        amp: mixed precision: "auto", "bfloat16", "float16" or "none".
        ema_decay: average the weights and keep the average; None for no average. The decay rises
            to this one by timm's warm-up: update t, from 1, has 1 - t^(-2/3) at most.
        seed: of shuffling, augmentation, drop path and drawn decisions, below 2³².
        keep_weight: for plans with selectors, weight of the average kept shares' distance from
            the plan's; with it the loss is SPViT's and `temperature` and `alpha` have no say.
        class_weight: there, weight of the dense model's answers; labels have 1.
        token_weight: there, weight of the dense model's tokens.
        frozen_epochs: for plans that learn, epochs in which only the plan does.
        backbone_rate: after them, learning rate of the model as a fraction of the plan's.

    Raises:
        UsageError: a number out of its range.
    """

    epochs: int = 5
    lr: float = 1e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    min_lr: float = 0.01
    temperature: float = 1.0
    alpha: float = 0.0
    clip: float = 1.0
    amp: str = "auto"
    ema_decay: float | None = None
    seed: int = 0
    keep_weight: float = 2.0
    class_weight: float = 0.5
    token_weight: float = 0.5
    frozen_epochs: int = 5
    backbone_rate: float = 0.01

    def __post_init__(self) -> None:
        for name in _WHOLE:
            whole(name, getattr(self, name), 0)
        if self.seed > _MOST_SEED:
            raise UsageError(f"seed must be at most {_MOST_SEED}, got {self.seed}")
        for name in _POSITIVE:
            number(name, getattr(self, name), above=0)
        for name in _NOT_NEGATIVE:
            number(name, getattr(self, name), least=0)
        number("alpha", self.alpha, least=0, most=1)
        one_of("amp", self.amp, ("auto", *AMP))
        if self.ema_decay is not None:
            number("ema_decay", self.ema_decay, above=0, below=1)


def spvit_settings(batch_size: int) -> dict[str, float]:
    """SPViT's own settings where they differ: 30 epochs at 5e-4 for 512 images a batch.

    Source: SPViT (Kong et al., ECCV 2022), section 4.1.
    """
    return {"epochs": 30, "lr": 5e-4 * batch_size / 512}


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for float32 throughout.

    "auto" takes bfloat16 where the hardware multiplies it natively (on such a CPU it is the faster
    one, on others it is emulated), else float32.
    """
    if amp != "auto":
        return AMP[amp]
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else device.type == "cpu" and _cpu_has_bfloat16()
    )
    return torch.bfloat16 if native else None


def _cpu_has_bfloat16() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
