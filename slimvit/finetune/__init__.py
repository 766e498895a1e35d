"""Fine-tuning of a whole slim model by distillation from the dense one."""

from slimvit.finetune._loss import class_loss, distillation_loss, keep_loss, token_loss
from slimvit.finetune._run import Result
from slimvit.finetune._settings import Settings, choose_amp, spvit_settings
from slimvit.finetune._state import plan_path, resume_path, save_weights, timm_weights
from slimvit.finetune._train import finetune

__all__ = [
    "Result",
    "Settings",
    "choose_amp",
    "class_loss",
    "distillation_loss",
    "finetune",
    "keep_loss",
    "plan_path",
    "resume_path",
    "save_weights",
    "spvit_settings",
    "timm_weights",
    "token_loss",
]
