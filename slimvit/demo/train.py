"""Train the digits model that `slimvit demo` prunes.

The shipped weights come from `python -m slimvit.demo.train` with its default arguments: a quarter
of an hour on one core. It sees the held-out digits once, after training, to measure the accuracy
that it writes beside the weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from slimvit.demo import _digits, _model
from slimvit.demo._initialise import initialise
from slimvit.errors import SlimvitError


def parser() -> argparse.ArgumentParser:
    """The arguments of this script."""
    result = argparse.ArgumentParser(
        prog="python -m slimvit.demo.train", description="Train the digits model of the demo."
    )
    result.add_argument(
        "--output", type=Path, default=Path(_model.WEIGHTS), help="weights to write, safetensors"
    )
    result.add_argument("--epochs", type=int, default=64)
    result.add_argument(
        "--full-epochs", type=int, default=14, help="the last of them, with no patch left out"
    )
    result.add_argument(
        "--patch-drop", type=float, default=0.5, help="share of patches left out before those"
    )
    result.add_argument("-b", "--batch-size", type=int, default=32)
    result.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    result.add_argument("--weight-decay", type=float, default=0.05)
    result.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    result.add_argument(
        "--ema", type=float, default=0.99, help="decay of the averaged weights, which are kept"
    )
    result.add_argument(
        "--samples", type=int, help="train on the first so many digits only (for a quick try)"
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--threads", type=int, default=1, help="the shipped weights were trained on one core"
    )
    return result


def train(args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Train from scratch; gives the averaged model and its held-out top-1 in percent."""
    torch.manual_seed(args.seed)
    train_split, held_out = _digits.load_splits()
    batches = _digits.Batches(
        train_split.first(args.samples), args.batch_size, seed=args.seed, training=True
    )
    model = _model.build(args.patch_drop)
    initialise(model)
    average = ModelEmaV3(model, decay=args.ema, use_warmup=True, warmup_power=0.75)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.99)
    )
    steps = args.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    bar = tqdm(range(args.epochs), "train", unit="epoch", disable=None)
    for epoch in bar:
        if epoch >= args.epochs - args.full_epochs:
            model.patch_drop = nn.Identity()
        loss = _epoch(model, average, batches, optimizer, schedule, args.smoothing)
        bar.set_postfix(loss=f"{loss:.3f}")
        if bar.disable:
            print(f"epoch {epoch + 1} of {args.epochs}: loss {loss:.3f}", flush=True)
    kept = _model.build()
    kept.load_state_dict(average.module.state_dict())
    return kept.eval(), accuracy(kept.eval(), _digits.held_out_batches(held_out))


def _epoch(
    model: nn.Module,
    average: ModelEmaV3,
    batches: _digits.Batches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    smoothing: float,
) -> float:
    """One pass over the training digits, drawn anew; gives the mean loss."""
    total = 0.0
    model.train()
    for images, labels in batches:
        loss = functional.cross_entropy(model(images), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(model, step=schedule.last_epoch)
        total += loss.item() / len(batches)
    return total


@torch.inference_mode()
def accuracy(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Top-1 in percent."""
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def main(argv: list[str] | None = None) -> int:
    """Train, measure on the held-out split, write the weights; 0 if all went well."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    try:
        if not args.output.resolve().parent.is_dir():
            raise SlimvitError(
                f"--output: the folder {args.output.resolve().parent} does not exist"
            )
        model, top1 = train(args)
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        _model.save(
            model, args.output, top1=round(top1, 2), settings=settings, torch=torch.__version__
        )
    except SlimvitError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(
        f"held-out top-1 {top1:.2f} %, {args.output.stat().st_size / 1e6:.2f} MB, {seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
