import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from slimvit.data import ImageFolder, _folder, image_transform, loader, parse_subset
from slimvit.errors import DataError, UsageError


def write_image(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """12 images of 3 classes; image i is all i."""
    for i in range(12):
        write_image(tmp_path / "images" / f"c{'abc'[i // 4]}" / f"{i}.png", i)
    return tmp_path / "images"


def corrupt(path):
    path.write_bytes(path.read_bytes()[:40])


def values(batches):
    """The images by their value, batch by batch."""
    return [[int(image[0, 0, 0]) for image in images] for images, _ in batches]


def test_order_and_labels(folder):
    images = ImageFolder(folder, num_classes=3)
    assert images.names[:5] == ["ca/0.png", "ca/1.png", "ca/2.png", "ca/3.png", "cb/4.png"]
    assert images.names[-2:] == ["cc/10.png", "cc/11.png"]
    assert images.labelled and images.why_unlabelled == ""
    assert images.targets == [0] * 4 + [1] * 4 + [2] * 4


def test_labels_from_a_class_map(folder, tmp_path):
    (tmp_path / "map.txt").write_text("x\ncc\ny\ncb\nca\n")
    images = ImageFolder(folder, tmp_path / "map.txt", num_classes=5)
    assert images.targets == [4] * 4 + [3] * 4 + [1] * 4


def test_a_class_map_may_begin_with_a_byte_order_mark(folder, tmp_path):
    (tmp_path / "map.txt").write_text("ca\ncb\ncc\n", encoding="utf-8-sig")
    assert ImageFolder(folder, tmp_path / "map.txt").targets == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("num_classes", [None, 2, 1000])
def test_no_labels_without_a_class_map(folder, num_classes):
    images = ImageFolder(folder, num_classes=num_classes)
    assert not images.labelled
    assert set(images.targets) == {-1}
    assert "no class map" in images.why_unlabelled and "3 class folders" in images.why_unlabelled


def test_flat_folder(tmp_path):
    for i in (1, 2, 10):
        write_image(tmp_path / f"{i}.jpg", i)
    images = ImageFolder(tmp_path, num_classes=1, transform=pil_to_tensor)
    assert images.names == ["1.jpg", "2.jpg", "10.jpg"]
    assert not images.labelled and "outside class folders" in images.why_unlabelled
    ((_, targets),) = loader(images, 3)
    assert targets.tolist() == [-1, -1, -1]


def test_hidden_and_other_files_are_left_out(folder):
    write_image(folder / ".trash" / "1.png", 1)
    write_image(folder / "ca" / "._0.png", 1)
    (folder / "ca" / "notes.txt").write_text("x")
    assert len(ImageFolder(folder)) == 12


def test_links_to_folders_are_followed(tmp_path):
    write_image(tmp_path / "elsewhere" / "0.png", 0)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ca").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "images").names == ["ca/0.png"]


def test_types_of_files(tmp_path):
    """Those of timm, and others that Pillow reads."""
    names = ["0.png", "1.jpg", "2.JPEG", "3.webp", "4.bmp", "5.tif", "6.TIFF"]
    for i, name in enumerate(names):
        write_image(tmp_path / name, 9 * i)
    images = ImageFolder(tmp_path, transform=pil_to_tensor)
    assert images.names == names
    ((read, _),) = loader(images, 9)
    assert (read[:, 0, 0, 0] - 9 * torch.arange(7)).abs().max() <= 1  # some lose a little


@pytest.mark.parametrize(
    "subset, samples, expected",
    [
        (None, None, list(range(12))),
        ("3:6", None, [3, 4, 5]),
        ("10:", None, [10, 11]),
        (":2", None, [0, 1]),
        ("-2:", None, [10, 11]),
        (None, 3, [0, 4, 8]),
        (None, 5, [0, 2, 4, 7, 9]),
        ("4:8", 2, [4, 6]),
        ("4:8", 99, [4, 5, 6, 7]),
    ],
)
def test_subset_and_samples(folder, subset, samples, expected):
    images = ImageFolder(folder, subset=subset, samples=samples, num_classes=3)
    assert images.positions == expected
    assert [int(os.path.basename(name)[:-4]) for name in images.names] == expected
    assert images.targets == [i // 4 for i in expected]


def test_labels_count_the_folders_of_the_whole_list(folder):
    assert ImageFolder(folder, subset="0:4", num_classes=3).labelled


def test_contents_are_names_and_what_some_files_hold(folder, monkeypatch):
    whole = ImageFolder(folder).contents()
    assert ImageFolder(folder).contents() == whole
    assert ImageFolder(folder, subset="1:").contents() != whole
    last = folder / "cc" / "11.png"
    content = last.read_bytes()
    os.utime(last, (0, 0))  # as a copy on another disk has another time
    assert ImageFolder(folder).contents() == whole
    last.write_bytes(content[:-1] + b"x")
    assert ImageFolder(folder).contents() != whole
    monkeypatch.setattr(_folder, "_MOST_READ", 3)  # images 0, 4 and 8
    some = ImageFolder(folder).contents()
    last.write_bytes(content)
    assert ImageFolder(folder).contents() == some != whole
    images = ImageFolder(folder)
    (folder / images.names[4]).unlink()
    assert images.contents() != some


def test_fingerprint_is_of_the_names(folder):
    fingerprint = ImageFolder(folder).fingerprint
    assert fingerprint == ImageFolder(folder).fingerprint
    assert fingerprint.startswith("12 images")
    assert fingerprint != ImageFolder(folder, subset="1:").fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named_skipped_and_counted(folder, workers, capsys):
    corrupt(folder / "cb" / "5.png")
    (folder / "cb" / "7.png").write_bytes(b"")
    images = ImageFolder(folder, transform=pil_to_tensor, num_classes=3)
    batches = loader(images, 3, workers)
    assert values(batches) == [[0, 1, 2], [3, 4], [6, 8], [9, 10, 11]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: ") for line in lines)
    assert str(folder / "cb" / "5.png") in lines[0] and str(folder / "cb" / "7.png") in lines[1]
    assert "2 of 12 images skipped" in lines[2]
    assert list(images.skipped) == ["cb/5.png", "cb/7.png"]
    assert values(batches) == [[0, 1, 2], [3, 4], [6, 8], [9, 10, 11]]
    assert capsys.readouterr().err == ""  # named once


def test_batch_without_a_readable_image(folder):
    for i in (3, 4, 5):
        corrupt(folder / f"c{'ab'[i // 4]}" / f"{i}.png")
    images = ImageFolder(folder, transform=pil_to_tensor)
    assert values(loader(images, 3)) == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert values(loader(images, 3, keep_empty=True)) == [[0, 1, 2], [], [6, 7, 8], [9, 10, 11]]


def test_no_readable_image_at_all(folder):
    for path in folder.rglob("*.png"):
        corrupt(path)
    for shard in [(0, 1), (1, 2)]:
        with pytest.raises(DataError, match=f"none of the 12 images in {folder} can be read"):
            list(loader(ImageFolder(folder, transform=pil_to_tensor), 4, shard=shard))


def test_a_shard_of_unreadable_images_is_no_error(folder):
    for name in ("0", "1", "2", "3"):
        corrupt(folder / "ca" / f"{name}.png")
    images = ImageFolder(folder, transform=pil_to_tensor)
    assert values(loader(images, 4, shard=(0, 3))) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_are_whole_batches(folder, world):
    corrupt(folder / "ca" / "1.png")
    images = ImageFolder(folder, transform=pil_to_tensor)
    alone = values(loader(images, 5))
    assert alone == [[0, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    shards = [loader(images, 5, shard=(rank, world)) for rank in range(world)]
    assert [len(shard) for shard in shards] == [len(values(shard)) for shard in shards]
    for rank, shard in enumerate(shards):
        assert values(shard) == alone[rank::world]


@pytest.mark.parametrize("world", [1, 2])
def test_shuffling(folder, world):
    images = ImageFolder(folder, transform=pil_to_tensor)
    shards = [loader(images, 5, shard=(r, world), shuffle_seed=3) for r in range(world)]
    first = [values(shard) for shard in shards]
    assert first == [values(shard) for shard in shards]
    assert len({len(batches) for batches in first}) == 1
    flat = [value for batches in first for batch in batches for value in batch]
    assert len(flat) == len(set(flat))
    if world == 1:
        assert sorted(flat) == list(range(12)) != flat
    for shard in shards:
        shard.epoch = 1
    assert first != [values(shard) for shard in shards]


def test_processes_draw_augmentations_of_their_own(folder):
    images = ImageFolder(folder, transform=lambda image: torch.rand(1, 1, 1))
    draws = [next(iter(loader(images, 4, 1, (rank, 2), shuffle_seed=0)))[0] for rank in range(2)]
    assert not torch.equal(*draws)


def test_batches_are_float_images_and_int64_targets(folder):
    transform = image_transform(timm.create_model("test_vit", img_size=32))
    images, targets = next(iter(loader(ImageFolder(folder, transform=transform), 5)))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert targets.shape == (5,) and targets.dtype == torch.int64


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_folder_errors(tmp_path, kind):
    root = tmp_path / "images"
    if kind == "file":
        root.write_text("x")
    elif kind == "empty":
        (root / "a").mkdir(parents=True)
    rule = {"missing": "does not exist", "file": "is a file", "empty": "holds no image"}[kind]
    with pytest.raises(DataError, match=f"{root} {rule}"):
        ImageFolder(root)


def test_unreadable_folder(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "cb":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{folder}/cb cannot be read: Permission denied"):
        ImageFolder(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ca\ncb\n", "does not list the folder 'cc'"),
        ("ca\ncb\ncc\nca\n", "line 4 names 'ca' twice"),
        ("ca\n\ncb\ncc", "line 2 is empty"),
        ("\n", "is empty"),
        ("x\ny\nz\nca\ncb\ncc", "makes 'cb' class 4, but the model has 4 classes"),
        (b"\xff\xfe\x00", "not a text file"),
        (None, "No such file"),
    ],
)
def test_class_map_errors(folder, tmp_path, text, message):
    path = tmp_path / "map.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(folder, path, num_classes=4)
    assert str(path) in str(caught.value)


def test_class_map_needs_class_folders(folder, tmp_path):
    (tmp_path / "map.txt").write_text("ca\ncb\ncc\n")
    write_image(folder / "1.png", 1)
    with pytest.raises(DataError, match="needs class folders"):
        ImageFolder(folder, tmp_path / "map.txt")


@pytest.mark.parametrize("subset", ["", "3", "a:b", "1:2:3", "1.5:2", 5, slice(0, 5), None])
def test_subset_must_be_a_slice(subset):
    with pytest.raises(UsageError, match="START:STOP"):
        parse_subset(subset)


def test_numbers_are_checked(folder):
    with pytest.raises(DataError, match="subset 20:30 holds none of the 12 images"):
        ImageFolder(folder, subset="20:30")
    with pytest.raises(UsageError, match="samples must be at least 1, got 0"):
        ImageFolder(folder, samples=0)
    with pytest.raises(UsageError, match="batch size must be at least 1, got 0"):
        loader(ImageFolder(folder), 0)
    with pytest.raises(UsageError, match="workers must be at least 0, got -1"):
        loader(ImageFolder(folder), 1, -1)


@pytest.mark.parametrize("shard", [(0, 0), (5, 2), (-1, 2), (0,), (0, 1, 2)])
def test_shard_is_checked(folder, shard):
    with pytest.raises(UsageError, match=r"shard must be \(rank, world\), .*, got \("):
        loader(ImageFolder(folder), 1, shard=shard)


@pytest.mark.parametrize("shard", [3, "01", (0.0, 1)])
def test_shard_is_whole_numbers(folder, shard):
    with pytest.raises(UsageError, match="shard must be .*whole number"):
        loader(ImageFolder(folder), 1, shard=shard)


def test_mode(tmp_path):
    write_image(tmp_path / "a.png", 3)
    Image.new("P", (8, 8)).save(tmp_path / "b.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "c.jpg")
    for mode, channels in (("L", 1), ("RGB", 3)):
        images, _ = next(iter(loader(ImageFolder(tmp_path, transform=pil_to_tensor, mode=mode), 3)))
        assert images.shape == (3, channels, 8, 8)


def test_real_labels(real):
    model = timm.create_model("deit_tiny_patch16_224")
    images = ImageFolder(
        real / "images",
        real / "imagenet_synsets.txt",
        samples=50,
        transform=image_transform(model),
        num_classes=1000,
    )
    assert images.targets == list(range(0, 1000, 20))
