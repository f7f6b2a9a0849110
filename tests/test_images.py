import hashlib
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from models.datasets import find_sets, read_mask
from models.errors import ModelError, TrainingDataError
from models.images import list_images, read_image, read_training_images
from models.preprocess import fit_to_input


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


def make_set(root, colours, kinds=("good", "scratch")):
    for folder in ("train/good", *(f"test/{kind}" for kind in kinds)):
        (root / folder).mkdir(parents=True)
        Image.fromarray(colours).save(root / folder / "0.png")


def test_labelled_sets(tmp_path, colours):
    make_set(tmp_path / "nut", colours)
    make_set(tmp_path / "bolt", colours)
    mask = tmp_path / "nut/ground_truth/scratch/0_mask.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(np.eye(4) > 0).save(mask)
    bolt, nut = find_sets(tmp_path)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert [(image.kind, image.is_defect) for image in nut.test] == [("good", False), ("scratch", True)]
    assert nut.has_masks
    assert not bolt.has_masks
    assert read_mask(nut.test[1], 8).sum() == 16
    assert read_mask(nut.test[0], 8).sum() == 0
    assert [each.name for each in find_sets(tmp_path / "nut")] == ["nut"]


def test_incomplete_sets(tmp_path, colours):
    with pytest.raises(TrainingDataError, match="expected train/good"):
        find_sets(tmp_path)
    (tmp_path / "nut/train/good").mkdir(parents=True)
    with pytest.raises(TrainingDataError, match="holds no images"):
        find_sets(tmp_path)
    Image.fromarray(colours).save(tmp_path / "nut/train/good/0.png")
    with pytest.raises(TrainingDataError, match="test: no such folder"):
        find_sets(tmp_path / "nut")
