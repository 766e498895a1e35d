"""Images of any depth come out with 8 bits a channel, or not at all."""

import warnings

import numpy as np
import pytest
from PIL import Image

from slimvit.cli.show import _read
from slimvit.data import ImageFolder
from slimvit.data._folder import Unreadable
from slimvit.errors import DataError
from slimvit.images import convert, read_image
from slimvit.masks._plot import _picture

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def read(kind, path):
    """The image as the folder or as `slimvit show` reads it."""
    if kind == "show":
        return np.asarray(_read(path))
    item = ImageFolder(path.parent)[0]
    assert not isinstance(item, Unreadable), item.reason
    return np.asarray(item[0])


@pytest.mark.parametrize("kind", ["folder", "show"])
def test_16_bits_of_grey_keep_their_range(tmp_path, kind):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    pixels = read(kind, tmp_path / "a.png")
    assert pixels.shape == (256, 256, 3)
    assert (pixels == np.round(RAMP / 257)[..., None]).all()


@pytest.mark.parametrize("kind", ["folder", "show"])
def test_images_are_read_as_they_are_stored(tmp_path, kind):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    image.save(tmp_path / "a.png", exif=exif)
    assert (read(kind, tmp_path / "a.png") == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "transparency", [None, 3, bytes(range(0, 250, 5))], ids=["none", "index", "bytes"]
)
def test_palettes_with_transparency_keep_their_colours_without_a_warning(
    tmp_path, mode, transparency
):
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 256, (64, 64), np.uint8), "P")
    image.putpalette(noise.integers(0, 256, 768, np.uint8).tobytes())
    given = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **given)
    with Image.open(tmp_path / "a.png") as file, warnings.catch_warnings():
        assert (file.mode, file.info.get("transparency")) == ("P", transparency)
        warnings.simplefilter("ignore")
        wanted = np.asarray(file.convert(mode))  # as timm and torchvision do
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_image(tmp_path / "a.png", mode)
    assert got.mode == mode and (np.asarray(got) == wanted).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_byte_orders(mode):
    raw = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (256, 256), raw)
    for wanted in ("L", "RGB"):
        assert convert(image, wanted).mode == wanted
        assert np.asarray(convert(image, wanted)).mean() == pytest.approx(127.5, abs=0.01)


def test_pictures_of_masks_are_drawn_on_16_bits():
    assert (np.asarray(_picture(Image.fromarray(RAMP))) == np.round(RAMP / 257)[..., None]).all()
    with pytest.raises(DataError, match="got 32"):
        _picture(Image.new("F", (8, 8)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(tmp_path, mode, capsys):
    Image.new(mode, (8, 8), 7).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=rf"8 or 16 bits a channel, got 32 \(mode {mode}\)"):
        read_image(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="--image .*a.tiff cannot be read .* got 32"):
        _read(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    images = ImageFolder(tmp_path)
    assert images.skip(images[0])
    assert f"a.png: an image must have 8 or 16 bits a channel, got 32 (mode {mode})" in (
        capsys.readouterr().err
    )


def test_a_damaged_file_of_16_bits_is_unreadable(tmp_path):
    Image.fromarray(np.random.default_rng(0).permutation(RAMP)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert isinstance(ImageFolder(tmp_path)[0], Unreadable)
