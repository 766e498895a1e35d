"""slimvit export: the pruned model as a file for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimvit.cli import _own_code, common

HELP = "write a pruned model as ONNX or as a torch.export program"
_FORMATS = {".onnx": "onnx", ".pt2": "pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit export`."""
    common.add_model_arguments(parser)
    common.add_masks_arguments(parser, required=False)
    parser.add_argument(
        "--format", choices=tuple(_FORMATS.values()), help="default: by the suffix of --output"
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=common.whole_number(1),
        metavar="N",
        help="fix the batch of an ONNX file (default: any batch)",
    )
    parser.add_argument(
        "--opset",
        type=common.whole_number(18),
        metavar="N",
        help="operator set of an ONNX file (default 18)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> int:
    """Export, check the file against the model, put it in place."""
    from slimvit.errors import UsageError
    from slimvit.export import OPSET, checked_batches, export_onnx, export_program
    from slimvit.runtime import apply_masks

    common.check_outputs(args, {"--output": args.output})
    named = _FORMATS.get(args.output.suffix)
    kind = args.format or named
    if kind is None:
        raise UsageError(f"--format is not given and {args.output} ends in neither .onnx nor .pt2")
    if named not in (kind, None):
        raise UsageError(f"--format {kind} writes no {named} file, got --output {args.output}")
    if kind == "pt2" and args.batch_size is not None:
        raise UsageError("--batch-size fixes the batch of ONNX files only, pt2 takes any batch")
    if kind == "pt2" and args.opset is not None:
        raise UsageError("--opset is of ONNX files only, pt2 has none")
    dense = args.masks is None and args.absorb is None
    if dense and args.slim_checkpoint is not None:
        raise UsageError("--slim-checkpoint needs --masks or --absorb")
    _own_code.load_imports(args)
    model = common.load_model(args, checkpoint=args.slim_checkpoint, need_weights=True)
    if not dense:
        common.warn_of_tuned_weights(args)
        model = apply_masks(model, common.load_masks(args, model))
    batch = args.batch_size or "dynamic"
    if kind == "onnx":
        export_onnx(model, args.output, batch=batch, opset=args.opset or OPSET)
    else:
        export_program(model, args.output)
    size = f": {args.output.stat().st_size / 1e6:.1f} MB" if args.output.is_file() else ""
    batches = " and ".join(map(str, checked_batches(batch)))
    common.say(f"wrote {args.output}{size}, answers like PyTorch at batch {batches}")
    return 0
