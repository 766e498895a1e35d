"""A folder of images as a dataset that names what it cannot read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from slimvit.checks import whole
from slimvit.data._labels import NO_LABEL, classes, find_images
from slimvit.data._transform import Transform
from slimvit.errors import DataError, UsageError
from slimvit.images import read_image

_MOST_READ = 1024  # files: a second or so, whatever the size of the data set


@dataclass(frozen=True)
class Unreadable:
    """Stands for an image that cannot be decoded; travels from the workers to the loader."""

    index: int
    reason: str


class ImageFolder(Dataset):
    """The images under a folder, in natural order of their paths, with their folders' classes.

    Line i of `class_map` names the folder of class i; without one, the sorted folder names are the
    classes where there are as many as `num_classes`; otherwise there are no labels.

    Args:
        root: folder of class folders, or of images.
        class_map: text file with one folder name a line.
        subset: "START:STOP", a slice of the sorted list of images.
        samples: how many images, evenly spaced over the subset; all if there are fewer.
        transform: PIL image -> [C, H, W]; see `image_transform`.
        num_classes: classes of the model, to decide on labels and to check them.
        mode: PIL's colour mode: "RGB", or "L" for models of one channel.

    Attributes:
        names: paths relative to `root`, in order.
        targets: the class of each image, -1 for none.
        labelled: whether the targets are classes.
        why_unlabelled: the reason where they are not, else "".
        positions: the images' places in the sorted list of the whole folder.
        skipped: name -> reason of the images found unreadable so far.

    Raises:
        DataError: a missing, empty or unreadable folder; a class map that does not fit.
        UsageError: a subset that is not START:STOP, samples below 1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        class_map: str | os.PathLike[str] | None = None,
        subset: str | None = None,
        samples: int | None = None,
        transform: Transform | None = None,
        *,
        num_classes: int | None = None,
        mode: str = "RGB",
    ) -> None:
        self.root, self.transform, self.mode = Path(root), transform, mode
        found = find_images(self.root)
        self.positions = _pick(len(found), subset, samples)
        if not self.positions:
            raise DataError(f"subset {subset} holds none of the {len(found)} images in {root}")
        self.names = [found[i] for i in self.positions]
        known, self.why_unlabelled = classes(self.root, found, class_map, num_classes)
        self.labelled = known is not None
        folders = (Path(name).parent.name for name in self.names)
        self.targets = [known[folder] if known else NO_LABEL for folder in folders]
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int] | Unreadable:
        try:
            image = read_image(self.root / self.names[index], self.mode)
        except Exception as error:  # PIL raises nearly anything on a damaged file
            return Unreadable(index, " ".join(str(error).split()) or type(error).__name__)
        return (self.transform(image) if self.transform else image), self.targets[index]

    @property
    def fingerprint(self) -> str:
        """How many images and a hash of their names: a masks file's note on its data."""
        names = "\n".join(self.names).encode(errors="surrogateescape")
        return f"{len(self)} images, names sha256 {hashlib.sha256(names).hexdigest()[:16]}"

    def contents(self) -> str:
        """A digest of the files' names, and of what is in up to 1024 of them."""
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=8)
        for i in _pick(len(self), None, _MOST_READ):
            with contextlib.suppress(OSError):  # it is skipped when it is its turn
                content = (self.root / self.names[i]).read_bytes()
                digest.update(b"%d\0" % len(content) + content)
        return digest.hexdigest()

    def skip(self, unreadable: Unreadable) -> bool:
        """Name an unreadable image on stderr, once; True when it is new."""
        name = self.names[unreadable.index]
        if name in self.skipped:
            return False
        self.skipped[name] = unreadable.reason
        warn(f"unreadable image skipped: {self.root / name}: {unreadable.reason}")
        return True


def parse_subset(subset: str) -> slice:
    """The slice that "START:STOP" means, either side optional.

    Raises:
        UsageError: anything else.
    """
    try:
        start, stop = (int(part) if part.strip() else None for part in subset.split(":"))
    except (AttributeError, ValueError):
        raise UsageError(f"subset must be START:STOP, such as 0:250, got {subset!r}") from None
    return slice(start, stop)


def warn(message: str) -> None:
    """One line on stderr that leaves progress bars whole."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _pick(count: int, subset: str | None, samples: int | None) -> list[int]:
    if samples is not None:
        samples = whole("samples", samples, 1)
    chosen = range(count)[parse_subset(subset)] if subset is not None else range(count)
    if samples is None or samples >= len(chosen):
        return list(chosen)
    return [chosen[i * len(chosen) // samples] for i in range(samples)]
