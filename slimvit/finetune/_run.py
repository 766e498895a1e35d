"""One run of the training loop, epoch by epoch."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from slimvit.checks import dtype_name, iterable
from slimvit.dynamic.file import check_savable
from slimvit.errors import DataError, PlanError, SlimvitError, UsageError
from slimvit.evaluate import evaluate, read_batch
from slimvit.files import refuse_device, refuse_unwritable, remove_leftovers, written_together
from slimvit.finetune._identity import data_digest, of_run
from slimvit.finetune._objective import Objective
from slimvit.finetune._optimizer import make_optimizer, make_schedule
from slimvit.finetune._random import seed_generators
from slimvit.finetune._settings import Settings, choose_amp
from slimvit.finetune._state import (
    load_resume,
    plan_path,
    resume_path,
    save_resume,
    save_weights,
)
from slimvit.finetune._student import Student, check_models, plan_of
from slimvit.models import spec

Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """What `finetune` gives.

    Attributes:
        model: the fine-tuned slim model in evaluation mode (the average where there is one).
        report: plain values: `epochs` (a list with loss, learning rate, seconds and, with
            validation images, top1, dense_top1 and agreement; where selectors learn, the share
            that each kept), `seconds`, `amp`, `resumed`, `settings`, and where there is a plan
            `plan` and `kept`, its counts.
    """

    model: nn.Module
    report: dict[str, Any]


class Run:
    """What a call of `finetune` works on, and its loop."""

    val_loader: Loader | None = None
    progress = True
    on_epoch: Callable[[dict[str, Any]], None] | None = None

    def __init__(
        self,
        slim: nn.Module,
        dense: nn.Module,
        loader: Loader,
        settings: Settings,
        output: str | Path | None,
        info: dict[str, Any],
    ) -> None:
        check_models(slim, dense)
        self.slim, self.dense, self.loader, self.settings = slim, dense, loader, settings
        self.output = Path(output) if output is not None else None
        if self.output is not None:
            refuse_device("output", self.output, resume_path(self.output).name)
            refuse_unwritable("output", self.output)
        self.device = next(slim.parameters()).device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        if self.output is not None and self.first:
            for path in (self.output, resume_path(self.output), plan_path(self.output)):
                remove_leftovers(path)
        self.amp = choose_amp(settings.amp, self.device)
        try:
            self.steps = len(iterable("loader", loader))
        except TypeError:
            raise UsageError("the loader of finetune must have a length") from None
        if self.steps == 0:
            raise DataError(f"too few images: {self.world} processes need a batch each")
        self.info = info
        self.identity = {} if self.output is None else self._identity()
        self._build()

    def _identity(self) -> dict[str, str]:
        """What the file of an unfinished run has to be of."""
        settings = asdict(self.settings) | {"steps": self.steps, "processes": self.world}
        (data,) = self._sum(data_digest(self.loader))
        found = of_run(settings, self.info, self.slim, self.dense)
        return found | {"images or labels": f"{data:.0f}"}

    def _build(self) -> None:
        s, self.plan = self.settings, plan_of(self.slim)
        self._learning = [p for p in self.slim.parameters() if p.requires_grad]
        weights = [] if self.plan is None else list(self.plan.parameters())
        self.learns = bool(weights) and self.plan.learns
        if self.output is not None and self.plan is not None:
            check_savable(self.plan)
        if self.plan is not None:
            self.plan.requires_grad_(self.learns)
        self.optimizer = make_optimizer(self.slim, self.learns, s)
        self.schedule = make_schedule(self.optimizer, s, self.steps)
        half = self.amp is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.ema = None
        if s.ema_decay is not None:
            self.ema = ModelEmaV3(self.slim, decay=s.ema_decay, use_warmup=True)
        self.objective = Objective(self.slim, self.dense, s)
        shape = spec(self.dense)
        self._image_shape = (shape.in_chans, *shape.image_size)
        self.backbone = [
            p
            for name, p in self.slim.named_parameters()
            if p.requires_grad and not name.startswith("plan.")
        ]
        self._frozen: bool | None = None

    def _freeze(self, frozen: bool) -> None:
        """Let the model learn with its plan, or the plan alone."""
        if frozen == self._frozen:
            return
        self._frozen = frozen
        for parameter in self.backbone:
            parameter.requires_grad_(not frozen)
        self.model: nn.Module = Student(self.slim)
        if self.world > 1:  # it asks once which parameters will have gradients
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=devices)

    @property
    def best(self) -> nn.Module:
        """What is evaluated and saved: the average where there is one."""
        return self.ema.module if self.ema is not None else self.slim

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.slim} | ({"ema": self.ema.module} if self.ema is not None else {})

    def train(self, restart: bool) -> Result:
        start = time.perf_counter()
        done, log = 0, []
        if self.output and not restart and resume_path(self.output).exists():
            notes = load_resume(
                resume_path(self.output), self.modules, self.optimizer, self.identity
            )
            done, log = notes["done"], notes["log"]
            self.scaler.load_state_dict(notes["scaler"])
        elif self.val_loader is not None:
            log.append(self._tell({"epoch": 0, **self._evaluate()}))
        resumed = done
        try:
            for epoch in range(done, self.settings.epochs):
                log.append(self._tell(self._epoch(epoch) | self._evaluate()))
                with written_together():
                    self._save(epoch + 1, log)
                    done = epoch + 1
        except (KeyboardInterrupt, SystemExit):
            self._stopped(done)
            raise
        finally:
            self.slim.eval()
            self._thaw()
        self._finish()
        report = {
            "epochs": log,
            "seconds": time.perf_counter() - start,
            "amp": "none" if self.amp is None else dtype_name(self.amp),
            "resumed": resumed,
            "settings": asdict(self.settings),
        }
        if self.plan is not None:
            report["plan"] = {"kind": self.plan.kind, **self.plan.settings()}
            report["kept"] = list(self.plan.counts)
        return Result(self.best.eval(), report)

    def _thaw(self) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(True)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        start, total, count = time.perf_counter(), 0.0, 0.0
        self._freeze(self.learns and epoch < self.settings.frozen_epochs)
        self._shares: list[Tensor] = []
        rank = dist.get_rank() if self.world > 1 else 0
        seed_generators(self.settings.seed + epoch * 1009 + rank, self.device)
        if hasattr(self.loader, "epoch"):
            self.loader.epoch = epoch
        self.model.train()
        bar = tqdm(
            self.loader,
            f"epoch {epoch + 1}/{self.settings.epochs}",
            total=self.steps,
            unit="batch",
            disable=None if self.progress and self.first else True,
            leave=False,
        )
        for step, batch in enumerate(bar):
            images, targets = read_batch(batch, self._image_shape)
            update = epoch * self.steps + step
            self.schedule.step_update(update)
            loss = self._step(images, targets, f"epoch {epoch + 1}, step {step + 1}")
            total, count = total + loss * len(targets), count + len(targets)
            if self.ema is not None:
                self.ema.update(self.slim, step=update + 1)
            bar.set_postfix(loss=f"{loss:.4f}")
        total, count = self._sum(total, count)
        if not count:
            raise DataError(f"there is no image to train on: epoch {epoch + 1} has none")
        seconds = time.perf_counter() - start
        rate = self.optimizer.param_groups[0]["lr"]
        entry = {"epoch": epoch + 1, "loss": total / count, "lr": rate, "seconds": seconds}
        if self._shares:
            means = torch.stack(self._shares).mean(0).tolist()
            entry["shares"] = [value / self.world for value in self._sum(*means)]
        return entry

    def _step(self, images: Tensor, targets: Tensor, where: str) -> float:
        """One update; the loss of this process's batch."""
        weight = 1.0
        if not len(targets):  # no image could be read: keep step with the other processes
            weight, images, targets = 0.0, self._blank(), torch.full((1,), -1)
        self.objective.check(targets)
        images = images.to(self.device, torch.float32)
        targets = targets.to(self.device)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            with self._autocast():
                answers = self.objective.teacher(images)
                student = self.model(images)
            loss = weight * self.objective(student, *answers, targets)
            if loss.requires_grad or not self.learns:
                self.scaler.scale(loss).backward()
        if student.shares is not None:
            self._shares.append(student.shares.detach().mean(0))
        if self.learns and all(p.grad is None for p in self.plan.parameters()):
            raise PlanError(
                f"no gradient reaches the weights of {type(self.plan).__name__}, which learns: "
                "places have none, so let them act through Choice.weight, or through the policy "
                "or the tokens that `before` returns"
            )
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.clip or float("inf")
        length = nn.utils.clip_grad_norm_(self.slim.parameters(), limit)
        value, norm, images_of_all = self._sum(loss.item(), length.item(), weight * len(images))
        # With float16 an infinite gradient is a scale too high, which the scaler steps over.
        bad_norm = not math.isfinite(norm) and not self.scaler.is_enabled()
        if bad_norm or not math.isfinite(value):
            what = "gradient" if math.isfinite(value) else "loss"
            raise SlimvitError(
                f"the {what} is not finite in {where}: try a lower learning rate or amp none; "
                "the files of the last epoch are as they were"
            )
        if images_of_all:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        try:
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                yield
        finally:  # inside another autocast copies of the weights would outlive their update
            torch.clear_autocast_cache()

    def _blank(self) -> Tensor:
        return torch.zeros(1, *self._image_shape)

    def _evaluate(self) -> dict[str, Any]:
        if self.val_loader is None:
            return {}
        found = evaluate(self.dense, self.best.eval(), self.val_loader, reduce=self.world > 1)
        return {"top1": found.top1, "agreement": found.agreement, "dense_top1": found.dense_top1}

    def _sum(self, *values: float) -> list[float]:
        """The values summed over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        sums = sums.to(self.device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
        return sums.tolist()

    def _tell(self, entry: dict[str, Any]) -> dict[str, Any]:
        if self.on_epoch is not None and self.first:
            self.on_epoch(entry)
        return entry

    def _save(self, done: int, log: list[dict[str, Any]]) -> None:
        if self.output is None or not self.first:
            return
        save_weights(self.output, self.best, {**self.info, "epochs": done})
        notes = {"identity": self.identity, "done": done, "log": log}
        notes["scaler"] = self.scaler.state_dict()
        save_resume(resume_path(self.output), self.modules, self.optimizer, notes)

    def _finish(self) -> None:
        if self.world > 1:
            dist.barrier()  # everyone has read the resume file
        if self.output is None or not self.first:
            return
        if self.settings.epochs == 0:
            save_weights(self.output, self.best, {**self.info, "epochs": 0})
        resume_path(self.output).unlink(missing_ok=True)

    def _stopped(self, done: int) -> None:
        if self.first and self.output is not None:
            kept = f"{self.output} holds epoch {done}" if done else "no epoch was finished"
            tqdm.write(f"stopped: {kept}; the same call goes on from there", file=sys.stderr)
