"""Models as files for other runtimes: ONNX of plain operators, and torch.export programs.

Both take what `apply_masks` returns, or a dense timm model. A file appears only after it has been
read back and has answered like the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimvit.checks import whole
from slimvit.dynamic import Planner
from slimvit.errors import ExportError, MismatchError, SlimvitError
from slimvit.files import atomic_write, is_device, put_in_place
from slimvit.models import copied

TOLERANCE = 1e-4
"""Largest relative error of a file's float32 logits; 1e-6 is usual."""
OPSET = 18
_PROTOBUF_LIMIT = 2_000_000_000  # bytes; one ONNX file cannot hold more
_CHECKED_SEEDS = 3


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch: str | int = "dynamic",
    opset: int = OPSET,
    check: bool = True,
) -> None:
    """Write `images` [batch, C, H, W] -> `logits` [batch, classes], float32, as one ONNX file.

    Args:
        model: a model with its masks or plan applied, or a dense one; it is not changed.
        path: the file; it holds the weights too.
        batch: "dynamic", or the one batch size that the file will take.
        opset: version of ONNX's operator set, from 18 to the newest that onnxscript converts to.
        check: compare the file's logits in ONNX Runtime with the model's before it is put in place.

    Raises:
        UsageError: `batch` is out of range, or `opset` below 18.
        ExportError: onnx, onnxscript or onnxruntime is missing, `opset` is too new for them, the
            model is too large for one file, or it cannot be exported, run or written.
        MismatchError: ONNX Runtime answers otherwise than the model.
    """
    if batch != "dynamic":
        batch = whole("batch, where it is not dynamic,", batch, 1)
    opset = whole("opset", opset, OPSET)
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    _check_opset(opset)
    model = _plain(model)
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if size > _PROTOBUF_LIMIT:
        raise ExportError(f"one ONNX file holds at most 2 GB, the weights take {size / 1e9:.1f} GB")
    images = _images(model, 2 if batch == "dynamic" else int(batch))
    with _beside(path) as temporary:
        with _as_export_error("ONNX cannot export this model"), quiet():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},) if batch == "dynamic" else None,
                input_names=["images"],
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            program.save(temporary, external_data=False)
        if check:
            with _as_export_error("ONNX Runtime cannot run the exported model"):
                _compare("ONNX Runtime", model, _onnxruntime(temporary), checked_batches(batch))
        put_in_place(temporary, path)


def export_program(model: nn.Module, path: str | os.PathLike[str], *, check: bool = True) -> None:
    """Write a `torch.export` program with a dynamic batch, for `torch.export.load(path).module()`.

    Args:
        model: a model with its masks or plan applied, or a dense one; it is not changed.
        path: the file, usually `*.pt2`.
        check: compare the file's logits, read back, with the model's before it is put in place.

    Raises:
        ExportError: the model cannot be exported or written.
        MismatchError: the file answers otherwise than the model.
    """
    model = _plain(model)
    images = _images(model, 2)
    buffer = io.BytesIO()
    with _as_export_error("torch.export cannot export this model"), quiet():
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        torch.export.save(program, buffer)
    if check:
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        _compare("torch.export", model, loaded, checked_batches())
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error


def why_not_file(plan: Planner | None) -> str | None:
    """The reason why no file can hold a model of this plan, or None."""
    if plan is None or not plan.ragged:
        return None
    return (
        f"{plan.kind} keeps another number of patches of each image: a file has fixed counts, give "
        "one without thresholds or argmax, such as prune makes without --per-image"
    )


def checked_batches(batch: str | int = "dynamic") -> tuple[int, ...]:
    """The batch sizes at which a file that takes `batch` is compared with its model."""
    return (1, 3) if batch == "dynamic" else (int(batch),)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The worst image's ‖got − wanted‖ / ‖wanted‖ of logits [B, classes]; inf if not finite."""
    return image_errors(got, wanted).max().item()


def image_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """‖got − wanted‖ / ‖wanted‖ of each image's logits [B, classes]: [B]; inf if not finite."""
    if got.shape != wanted.shape:
        return torch.full(wanted.shape[:1], torch.inf, dtype=torch.float64)
    wanted = wanted.double().flatten(1)
    off = (got.to(wanted) - wanted.view(got.shape)).flatten(1)
    errors = off.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    return torch.where(errors.isfinite(), errors, torch.inf)


def sample_images(shape: tuple[int, int, int], batch: int, seed: int = 0) -> Tensor:
    """Fixed random images [batch, C, H, W] on which models differ: coarse blobs with fine noise.

    Noise alone looks alike to a model, image for image and patch for patch, and would let the
    wrong tokens pass; on these, logits of the wrong tokens are some 20 % off and bfloat16 1 %.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 7, 7, generator=generator)
    blobs = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return blobs + 0.2 * torch.randn(batch, channels, height, width, generator=generator)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Compilers' and exporters' progress and notes, which no user of ours can act on, silenced."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _images(model: nn.Module, batch: int, seed: int = 0) -> Tensor:
    embedding: Any = getattr(model, "patch_embed", None)
    if getattr(embedding, "img_size", None) is None or not hasattr(embedding, "proj"):
        raise ExportError(
            f"{type(model).__name__} cannot be exported: give a timm model "
            "or what apply_masks makes of it"
        )
    return sample_images((embedding.proj.in_channels, *embedding.img_size), batch, seed)


def _plain(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float32, in eval mode, that needs no gradient."""
    reason = why_not_file(getattr(model, "plan", None))
    if reason is not None:
        raise ExportError(reason)
    return copied(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _compare(
    what: str, model: nn.Module, run: Callable[[Tensor], Tensor], batches: tuple[int, ...]
) -> None:
    """Every image within TOLERANCE; where each image has tokens of its own, most of them.

    Two scores that are equal but for the last bit may be ranked otherwise elsewhere, and an image
    of other tokens has other logits: so a median over some images counts, for each batch size.
    """
    chooses = getattr(model, "plan", None) is not None
    for batch in batches:
        errors = []
        for seed in range(_CHECKED_SEEDS if chooses else 1):
            images = _images(model, batch, seed)
            with torch.no_grad():
                errors.append(image_errors(run(images), model(images)))
        found = torch.cat(errors)
        error = (found.median() if chooses else found.max()).item()
        if not error <= TOLERANCE:
            raise MismatchError(
                f"the exported model in {what} is {error:.1e} off at batch {batch}, "
                f"more than {TOLERANCE:.0e}"
            )


def _onnxruntime(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _check_opset(opset: int) -> None:
    """Refuse an operator set that onnxscript cannot convert a model to, as torch asks it to."""
    if opset == OPSET:
        return
    import onnx
    from onnxscript import ir, version_converter

    newest = OPSET
    with quiet(), contextlib.suppress(Exception):  # beyond its newest, whatever it raises
        for version in range(OPSET + 1, onnx.defs.onnx_opset_version() + 1):
            empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}), ir_version=10)
            version_converter.convert_version(empty, version, fallback=False)
            if empty.opset_imports[""] != version:
                break
            newest = version
    if opset > newest:
        raise ExportError(
            f"opset must be from {OPSET} to {newest}, to which the installed onnxscript converts, "
            f"got {opset}"
        )


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting to ONNX needs {', '.join(missing)}: pip install 'slimvit[export]'"
        )


@contextlib.contextmanager
def _beside(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary neighbour of what `path` names, gone afterwards unless it was renamed."""
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder or in none that exists")
    beside = None if is_device(path) else target.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=beside) as folder:
            yield os.path.join(folder, "model")
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _as_export_error(failure: str) -> Iterator[None]:
    """Whatever foreign code raises, in one line; its own report stays as the cause."""
    try:
        yield
    except (OSError, MemoryError, SlimvitError):
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(f"{failure}: {first.strip()}") from error
