"""What runs a model: slimvit's back ends, and the runtimes that they are compared with.

Every runtime takes float32 images on the device and gives float32 logits there, whatever it
computes in, so that each pays for its own conversions.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimvit.bench._report import STATIC
from slimvit.dynamic import Planner
from slimvit.export import export_onnx, quiet, why_not_file
from slimvit.masks import Masks
from slimvit.runtime import PRECISIONS, accelerate, apply_masks


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share; `precision` is the one asked for, `threads` are the CPU's."""

    device: torch.device
    batch: int
    precision: str
    threads: int
    backend: str = "auto"


class Workload:
    """The model and what it keeps in the forms that runtimes take; each form is made once.

    Args:
        model: dense model on the device.
        masks: kept sets, or a dynamic plan bound to the model.
        images: float32 [B, C, H, W] on the device: a batch like those that are timed.
        folder: where exported files may lie.
    """

    def __init__(
        self, model: nn.Module, masks: Masks | Planner, images: Tensor, folder: Path
    ) -> None:
        self.model = model
        self.masks = masks
        self.images = images
        self._folder = folder

    @property
    def plan(self) -> Planner | None:
        """The dynamic plan, or None where masks are the same for all images."""
        return None if isinstance(self.masks, Masks) else self.masks

    @property
    def dense(self) -> Masks:
        """Masks that keep everything."""
        return Masks.dense(len(self.masks.counts), self.masks.grid, self.masks.prefix)

    @property
    def static(self) -> Masks:
        """Static masks of the same counts as the plan's."""
        return Masks.from_counts(self.masks.counts, self.masks.grid, self.masks.prefix)

    @functools.cached_property
    def slim(self) -> nn.Module:
        """The slimmed model in plain PyTorch."""
        return apply_masks(self.model, self.masks).eval()

    def network(self, pruned: bool) -> nn.Module:
        """The slimmed or the dense model in plain PyTorch: the references."""
        return self.slim if pruned else self.model

    def onnx(self, pruned: bool) -> Path:
        """The ONNX file of `network(pruned)`; whoever runs it is verified, so the file is not.

        But for a plan's: which tokens it keeps cannot be seen from outside, so that the file is
        compared in float32, where the bound is tight.
        """
        path = self._folder / ("slim.onnx" if pruned else "dense.onnx")
        if not path.exists():
            export_onnx(self.network(pruned), path, check=pruned and self.plan is not None)
        return path


class Runtime(ABC):
    """One row: a runtime with one model in it.

    Attributes:
        name: as `--against` takes it and the results show it.
        prunes: whether it is measured with the slimmed model as well.
        precision: what it computes in, which may be more than what was asked for.
    """

    name: ClassVar[str]
    prunes: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.precision = setting.precision

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        """The reason why it cannot be measured here, or None."""
        return None

    @classmethod
    def why_not_slim(cls, work: Workload) -> str | None:
        """The reason why its slimmed model cannot be measured, or None."""
        return None

    @property
    def label(self) -> str:
        """The name in the results."""
        return self.name

    @abstractmethod
    def prepare(self, work: Workload, pruned: bool) -> None:
        """Make it ready to run the dense or the slimmed model."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of float32 images [B, C, H, W]."""

    def kept_sets(self, images: Tensor) -> list[Tensor] | None:
        """Places that each block keeps, L of [B, n]; None for what does not tell."""
        return None


class Slimvit(Runtime):
    """`accelerate` with the masks or the plan, or with masks that keep everything."""

    name = "slimvit"
    prunes = True

    @property
    def label(self) -> str:
        return f"slimvit:{self._fast.backend}"

    def prepare(self, work: Workload, pruned: bool) -> None:
        self._accelerate(work, work.masks if pruned else work.dense)

    def _accelerate(self, work: Workload, masks: Masks | Planner) -> None:
        backend, precision = self.setting.backend, self.setting.precision
        self._fast = accelerate(work.model, masks, backend=backend, precision=precision)

    def __call__(self, images: Tensor) -> Tensor:
        return self._fast(images)

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        return self._fast.kept_sets(images)


class SlimvitStatic(Slimvit):
    """`accelerate` with static masks of the same counts as the plan's: what choosing costs."""

    @property
    def label(self) -> str:
        return super().label + STATIC

    def prepare(self, work: Workload, pruned: bool) -> None:
        self._accelerate(work, work.static)


class Torch(Runtime):
    """timm's model, eager."""

    name = "torch"

    def prepare(self, work: Workload, pruned: bool) -> None:
        self._dtype = PRECISIONS[self.setting.precision]
        self._net: Any = copy.deepcopy(work.network(pruned)).eval().to(self._dtype)

    def __call__(self, images: Tensor) -> Tensor:
        return self._net(images.to(self._dtype)).float()


class TorchCompile(Torch):
    """timm's model through torch.compile, in CUDA graphs on a GPU."""

    name = "torch.compile"

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        if setting.device.type == "cuda":
            found = importlib.util.find_spec("triton") is not None
            return None if found else "torch.compile needs triton for GPUs"
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
        return None if any(map(shutil.which, compilers)) else "torch.compile needs a C++ compiler"

    def prepare(self, work: Workload, pruned: bool) -> None:
        super().prepare(work, pruned)
        if self.setting.device.type == "cuda":
            options: dict[str, Any] = {"triton.cudagraphs": True}
        else:
            options = {"cpp.threads": self.setting.threads}
        self._net = torch.compile(self._net, fullgraph=True, dynamic=False, options=options)
        with quiet(), torch.inference_mode():  # compiles now
            self(work.images)


class _OfFile(Runtime):
    """What runs the exported model."""

    prunes = True

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        return _needs(cls.name, setting)

    @classmethod
    def why_not_slim(cls, work: Workload) -> str | None:
        return why_not_file(work.plan)


class OnnxRuntime(_OfFile):
    """The exported model in ONNX Runtime's CPU provider, which computes in float32 only."""

    name = "onnxruntime"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.precision = "float32"

    def prepare(self, work: Workload, pruned: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.setting.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", self.setting.batch)
        options.add_session_config_entry("session.force_spinning_stop", "1")  # others run next
        file = str(work.onnx(pruned))
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(file, options, providers=providers)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {"images": images.numpy()})[0])


class OpenVino(_OfFile):
    """The exported model in OpenVINO: its latency mode, one request at a time, a fixed batch."""

    name = "openvino"
    _HINTS: ClassVar[dict[str, str]] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

    def prepare(self, work: Workload, pruned: bool) -> None:
        core = openvino_core()
        model = core.read_model(str(work.onnx(pruned)))
        model.reshape(list(work.images.shape))
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._HINTS[self.setting.precision],
            "INFERENCE_NUM_THREADS": self.setting.threads,
        }
        compiled = core.compile_model(model, "CPU", options)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = {hint: name for name, hint in self._HINTS.items()}.get(used, "float32")
        self._request = compiled.create_infer_request()

    def __call__(self, images: Tensor) -> Tensor:
        out = self._request.infer([images.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0])


@functools.cache
def openvino_core() -> Any:
    """The one Core of this process.

    Compiling a model gives the thread a signal stack. If another thread drops the last Core, the
    stack goes away and stays registered: the next signal, Ctrl-C too, then ends the process.
    """
    import openvino

    return openvino.Core()


RUNTIMES: dict[str, type[Runtime]] = {
    runtime.name: runtime for runtime in (Torch, TorchCompile, OnnxRuntime, OpenVino)
}


def _needs(module: str, setting: Setting) -> str | None:
    if setting.device.type != "cpu":
        return f"{module} is measured on CPUs only"
    for package in (module, "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install 'slimvit[export]'"
    return None
