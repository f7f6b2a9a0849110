import hashlib
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from models.errors import ModelError, TrainingDataError
from models.images import image_size, list_images, read_image, read_nonzero, read_training_images
from models.preprocess import fit_to_input
from producers.frame import Picture, header_size


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


def test_colour_order_is_rgb(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_grey_becomes_three_equal_channels(tmp_path, colours):
    grey = np.ascontiguousarray(colours[:, :, 0])
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[:, :, None], 3, axis=2))


def test_alpha_is_dropped(tmp_path, colours):
    rgba = np.dstack([colours, np.full((6, 5), 7, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_upper_byte(tmp_path, suffix):
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), deep)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[:, :, 1], deep >> 8)


def test_16_bit_colour(tmp_path, colours):
    cv2.imwrite(str(tmp_path / "a.png"), colours[:, :, ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_images_of_one_product_are_scaled_alike(tmp_path):
    # A 12-bit camera's values at the bottom of 16 bits: dark, but a darker scene stays the darker one.
    bright = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    for name, deep in (("bright", bright), ("dim", bright // 2)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), deep)
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png")[:, :, 0], deep >> 8)
    assert read_image(tmp_path / "bright.png").max() == 15
    # Shifted up by the four bits the camera lacks, they keep 8.
    cv2.imwrite(str(tmp_path / "shifted.png"), bright << 4)
    assert read_image(tmp_path / "shifted.png").max() == 255


def pictures(colours: np.ndarray) -> dict[str, Image.Image]:
    """The same colours, or the grey of the first channel, in the modes that PNG has."""
    grey, alpha = Image.fromarray(colours[:, :, 0].copy()), Image.fromarray(colours[:, :, 1].copy())
    palette = Image.fromarray(colours).quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "grey": grey,
        "grey and alpha": Image.merge("LA", [grey, alpha]),
        "16-bit grey": Image.fromarray(colours[:, :, 0].astype(np.uint16) * 256 + colours[:, :, 1]),
        "1 bit": Image.fromarray(colours[:, :, 0] > 127),
        "palette": palette,
        "palette with a transparent colour": see_through,
        "RGB": Image.fromarray(colours),
        "RGBA": Image.fromarray(np.dstack([colours, colours[:, :, 0]])),
    }


@pytest.mark.parametrize("kind", pictures(np.zeros((6, 5, 3), np.uint8)))
def test_every_mode_is_read_as_in_serving(tmp_path, colours, kind):
    picture = pictures(colours)[kind]
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    channels = 1 if kind in ("grey", "grey and alpha", "16-bit grey", "1 bit") else 3
    image = read_image(tmp_path / "a.png")
    assert (image.shape, image.dtype) == ((6, 5, 3), np.uint8)
    np.testing.assert_array_equal(image, Picture("png", (6, 5, channels), data).decode())
    assert image.max() > 0
    assert image_size(tmp_path / "a.png") == header_size(data) == (6, 5)


def test_palette_becomes_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "a.png")
    wanted = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [10, 20, 30]]]
    assert read_image(tmp_path / "a.png").tolist() == wanted


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(TrainingDataError, match=r"a.tif: floating-point images have no fixed range"):
        read_image(tmp_path / "a.tif")
    # A mask has no range to know.
    assert read_nonzero(tmp_path / "a.tif").all()


def test_orientation_tag_turns_nothing_as_in_serving(tmp_path, colours):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_cut_off_file(tmp_path, colours):
    big = np.kron(colours, np.ones((30, 30, 1), np.uint8))
    for suffix in ("jpg", "png"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(big).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(TrainingDataError, match=f"cut.{suffix}: corrupt image"):
            read_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "a.png: ")],
)
def test_useless_files(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(TrainingDataError, match=message) as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(TrainingDataError, match="No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(TrainingDataError, match="no such folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(TrainingDataError, match="holds no images"):
        list_images(tmp_path)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [8001, 12_000, 30_000])
def test_huge_image_is_refused_by_its_header(tmp_path, side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    # There are no pixels behind the header: reading them would be another error.
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(TrainingDataError, match=r"huge.png.*64 megapixels"):
        read_image(tmp_path / "huge.png")


def test_listing_is_sorted_and_not_recursive(tmp_path, colours):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.png").touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG"]


def test_training_images_are_fitted_and_recorded(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    images, records = read_training_images([tmp_path / "a.png"], 32)
    assert images.shape == (1, 32, 32, 3)
    assert records[0].id == "a.png"
    assert records[0].sha256 == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()


def test_images_of_mixed_sizes_and_modes_are_read_in_order(tmp_path, colours):
    for index, picture in enumerate(pictures(colours).values()):
        picture.resize((20 + 7 * index, 90 - 9 * index)).save(tmp_path / f"{index}.png")
    paths = list_images(tmp_path)
    images, records = read_training_images(paths, 32)
    assert (images.shape, images.dtype) == ((8, 32, 32, 3), np.uint8)
    for image, record, path in zip(images, records, paths, strict=True):
        np.testing.assert_array_equal(image, fit_to_input(read_image(path), 32))
        assert record.id == path.name


def test_shrinking_averages_and_nothing_is_cut():
    image = np.zeros((200, 100, 3), np.uint8)
    image[::2] = 200
    small = fit_to_input(image, 50)
    assert small.shape == (50, 50, 3)
    assert np.unique(small).tolist() == [100]
    assert fit_to_input(small, 50) is small
    assert fit_to_input(small, 96).shape == (96, 96, 3)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ModelError, match=r"expected \(H, W, 3\) uint8"):
        fit_to_input(np.zeros(shape, np.uint8), 32)
