"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to a temporary neighbour of `path`, then rename it into place.

    A link stays a link, to the new content; a file that was there leaves its mode to the new one; a
    device such as /dev/null is written to.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is untouched.
    """
    if is_device(path):
        try:
            Path(path).write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        return
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
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


def put_in_place(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Rename a finished file to `path`, as `atomic_write` does; copy it into a device.

    Args:
        temporary: beside what `path` names, unless that is a device.
        path: a file, there already or not, a link to one, or a device.

    Raises:
        OSError: `path` is a folder or cannot be written to.
    """
    if is_device(path):
        with open(temporary, "rb") as source, open(path, "wb") as device:
            shutil.copyfileobj(source, device)
        return
    target = os.path.realpath(path)
    os.chmod(temporary, _mode(target))
    os.replace(temporary, target)


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether a device, a pipe or a socket is there: what is written to and never replaced."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _mode(target: str) -> int:
    try:
        return stat.S_IMODE(os.stat(target).st_mode) & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
