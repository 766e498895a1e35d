"""What tests of fine-tuning share."""

import torch

QUICK = {"lr": 1e-3, "amp": "none", "progress": False, "warmup_epochs": 0}


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
