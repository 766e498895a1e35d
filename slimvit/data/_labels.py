"""Which images lie under a folder, and which class each one is of."""

from __future__ import annotations

import os
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from slimvit.errors import DataError

NO_LABEL = -1
_MORE_TYPES = (".webp", ".bmp", ".tif", ".tiff")  # Pillow reads them, timm's list leaves them out


def find_images(root: Path) -> list[str]:
    """Paths of the images under `root`, relative to it, in natural order.

    Hidden files and folders are left out; a folder that cannot be read is an error.

    Raises:
        DataError: `root` is missing, a file, unreadable, or holds no image.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"images are read from a folder, but {root} {what}")
    types, names = (*get_img_extensions(), *_MORE_TYPES), []
    try:
        for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for file in files:
                if not file.startswith(".") and Path(file).suffix.lower() in types:
                    names.append(os.path.relpath(os.path.join(folder, file), root))
    except OSError as error:
        where = error.filename or root
        raise DataError(f"image folder {where} cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"image folder {root} holds no image ({' '.join(types)})")
    return natural_sort(names)


def classes(
    root: Path,
    names: list[str],
    class_map: str | os.PathLike[str] | None,
    num_classes: int | None,
) -> tuple[dict[str, int] | None, str]:
    """Class of each folder name; or None, and why there are no labels.

    Raises:
        DataError: a class map that cannot be read, or does not fit the folders or the model.
    """
    folders = natural_sort({Path(name).parent.name for name in names})
    if class_map is None:
        if "" in folders:
            return None, f"{root} has images outside class folders"
        if num_classes is None or len(folders) != num_classes:
            wanted = "" if num_classes is None else f", the model {num_classes} classes"
            return None, f"no class map, and {root} has {len(folders)} class folders{wanted}"
        return {name: i for i, name in enumerate(folders)}, ""
    listed = read_class_map(Path(class_map))
    for folder in folders:
        if not folder:
            raise DataError(f"class map {class_map} needs class folders, but images lie in {root}")
        if folder not in listed:
            raise DataError(f"class map {class_map} does not list the folder {folder!r} of {root}")
        if num_classes is not None and listed[folder] >= num_classes:
            raise DataError(
                f"class map {class_map} makes {folder!r} class {listed[folder]}, "
                f"but the model has {num_classes} classes"
            )
    return listed, ""


def read_class_map(path: Path) -> dict[str, int]:
    """Folder name -> class of a text file whose line i names the folder of class i.

    Raises:
        DataError: the file is unreadable, empty, or names a folder twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise DataError(f"class map {path} cannot be read: {reason}") from error
    listed: dict[str, int] = {}
    for i, line in enumerate(text.rstrip().splitlines()):
        name = line.strip()
        if not name or name in listed:
            what = f"names {name!r} twice" if name else "is empty"
            raise DataError(f"class map {path}, line {i + 1} {what}: one class folder name a line")
        listed[name] = i
    if not listed:
        raise DataError(f"class map {path} is empty: it needs one class folder name a line")
    return listed


def natural_sort(names: set[str] | list[str]) -> list[str]:
    """Names in timm's natural order (2 before 10), ties by code point."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def _raise(error: OSError) -> None:
    raise error
