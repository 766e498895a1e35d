"""The command line: `slimvit COMMAND …`.

A command's module is imported only when it is called, so that `slimvit --help` is instant.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from slimvit import __version__
from slimvit.errors import SlimvitError, UsageError
from slimvit.files import descriptor

COMMANDS = {
    "prune": "search which patches each block needs and save the masks or the plan",
    "finetune": "fine-tune a pruned model by distillation from the dense one",
    "validate": "top-1, top-5 and agreement of the pruned model with the dense one",
    "bench": "time dense and pruned models side by side in one run",
    "latency-table": "measure what blocks cost by the share of patches that they keep",
    "show": "draw the kept patches of a masks file or a plan, block by block",
    "export": "write a pruned model as ONNX or as a torch.export program",
    "doctor": "tell what works on this machine and why the rest does not",
    "demo": "prune, fine-tune, validate and time a small model in a few minutes",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _fail(self.prog, message, hint=True)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # shared hosts: no spinning beside others
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    prog = "slimvit"
    try:
        _top_parser().parse_args(arguments[:1])
        prog = f"slimvit {arguments[0]}"
        module = importlib.import_module(f"slimvit.cli.{arguments[0].replace('-', '_')}")
        parser = _Parser(prog=prog, description=module.HELP, allow_abbrev=False)
        module.add_arguments(parser)
        if "--debug" not in parser._option_string_actions:
            parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
        _print_any_name()
        args = parser.parse_args(arguments[1:])
        with _terminable(), _printed(args):
            status = module.run(args) or 0
        print(end="", flush=True)  # what stdout refuses is an error here, not at exit
        return status
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _status(prog, error)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def end(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _printed(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Print to stderr where stdout is for --json alone."""
    json = getattr(args, "json", None)
    alone = json is not None and descriptor(json) == 1
    return contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext()


def _top_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    parser = _Parser(
        prog="slimvit",
        usage="slimvit COMMAND …    (slimvit COMMAND --help tells more)",
        description="Prune the patches that a vision transformer does not need.\n\n"
        + "\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"slimvit {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _print_any_name() -> None:
    """Let stdout escape what its encoding lacks, as stderr does: file names hold any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _status(prog: str, error: BaseException) -> int:
    """Say in one line what went wrong; the exit status for it."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, OSError):
        _drop_unprinted()
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, SlimvitError):
        usage = isinstance(error, UsageError)
        _fail(prog, str(error), hint=usage)
        return 2 if usage else 1
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        _fail(prog, f"{named}{error.strerror}")
        return 1
    _fail(prog, f"{type(error).__name__}: {error} (--debug shows where)")
    return 1


def _drop_unprinted() -> None:
    """Send what stdout refuses nowhere, so that Python does not complain at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(prog: str, message: str, hint: bool = False) -> None:
    line = " ".join(message.split())
    more = f" (see {prog} --help)" if hint else ""
    print(f"{prog}: error: {line}{more}", file=sys.stderr)
