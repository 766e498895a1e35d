"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from slimvit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_OWN = ("/dev/fd", "/proc/self/fd")
_MOST_LINKS = 40  # as Linux follows
_PREFIX = _ALIGNED = 8  # bytes of a safetensors header's length, and what its tensors begin at


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to a temporary neighbour of `path`, then rename it into place.

    A link stays a link, to the new content; a file that was there leaves its mode to the new one; a
    device such as /dev/null is written to, and /dev/stdout after what was printed.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is untouched.
    """
    if is_device(path):
        try:
            with _open_device(path) as device:
                device.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        return
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        prefix = f".{target.name}.{os.getpid()}."
        handle, temporary = tempfile.mkstemp(prefix=prefix, dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what `atomic_write` left beside `path` in processes that were killed meanwhile."""
    target = Path(os.path.realpath(path))
    unfinished = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.[a-z0-9_]{{8}}")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            found = unfinished.fullmatch(name)
            if found and not _runs(int(found[1])):
                os.unlink(target.parent / name)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return process != os.getpid()  # one with this number, before: this one is not writing


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of these tensors and strings, the same bytes whenever it is made.

    safetensors writes the strings in an order that changes from call to call; here the header is
    sorted, and padded with spaces so that the tensors begin at a multiple of 8 bytes.
    """
    from safetensors.torch import save

    content = memoryview(save(tensors, metadata))
    start = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
    header = json.loads(bytes(content[_PREFIX:start]))
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return b"".join((len(text).to_bytes(_PREFIX, "little"), text, content[start:]))


@contextlib.contextmanager
def written_together() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM wait for the block, whose files belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if waiting and callable(before[number]):  # asked twice
            before[number](number, frame)
        waiting.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler is not None]
    for number in ours:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        if waiting:
            signal.raise_signal(waiting[0])


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let other processes that ask the same wait: what is read there stays so until it is written.

    Where a folder cannot be read, or its file system has no locks, nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def put_in_place(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Rename a finished file to `path`, as `atomic_write` does; copy it into a device.

    Args:
        temporary: beside what `path` names, unless that is a device.
        path: a file, there already or not, a link to one, or a device.

    Raises:
        OSError: `path` is a folder or cannot be written to.
    """
    if is_device(path):
        with open(temporary, "rb") as source, _open_device(path) as device:
            shutil.copyfileobj(source, device)
        return
    target = os.path.realpath(path)
    os.chmod(temporary, _mode(target))
    os.replace(temporary, target)


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether a device, a pipe or a socket is there: what is written to and never replaced.

    So is what a descriptor of this process names, /dev/stdout among them, be it a file.
    """
    if descriptor(path) is not None:
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def descriptor(path: str | os.PathLike[str]) -> int | None:
    """N where `path`, or a link that it is, names /dev/fd/N of this process; /dev/stdout is 1."""
    own = {os.path.realpath(folder) for folder in _OWN}
    place = os.fsdecode(path)
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(place)
        if name.isdecimal() and os.path.realpath(folder) in own:
            return int(name)
        if not os.path.islink(place):
            return None
        place = os.path.join(folder, os.readlink(place))
    return None


def is_writable(device: str | os.PathLike[str]) -> bool:
    """Whether a device, for which `is_device` holds, takes what is written."""
    number = descriptor(device)
    if number is None:
        return os.access(device, os.W_OK)
    try:
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:  # it is not open
        return False
    return mode != os.O_RDONLY


def refuse_device(name: str, path: str | os.PathLike[str], beside: str) -> None:
    """Refuse a device as the output `name` of a command or a call that puts `beside` beside it.

    Raises:
        UsageError: `path` is a device.
    """
    if is_device(path):
        raise UsageError(f"{name} must be a file, {beside} goes beside it, got the device {path}")


def refuse_unwritable(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse the output `name` where no file can be, before hours are spent on what goes into it.

    Raises:
        UsageError: `path` is a folder, or its own folder is missing or not writable.
    """
    if os.path.isdir(path):
        raise UsageError(f"{name} must be a file, got the folder {path}")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"{name} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{name} {path}: the folder {folder} is not writable")


def _open_device(path: str | os.PathLike[str]) -> BinaryIO:
    number = descriptor(path)
    if number is None:
        return open(path, "wb")
    print(end="", flush=True)  # opened anew, a file would be written from its start
    return os.fdopen(os.dup(number), "wb")


def _mode(target: str) -> int:
    try:
        return stat.S_IMODE(os.stat(target).st_mode) & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
