"""Fine-tuning of a whole slim model by distillation from the dense one."""

from slimvit.finetune._loss import distillation_loss
from slimvit.finetune._settings import Settings, choose_amp
from slimvit.finetune._state import save_weights
from slimvit.finetune._train import Result, finetune

__all__ = ["Result", "Settings", "choose_amp", "distillation_loss", "finetune", "save_weights"]
