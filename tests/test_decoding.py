"""Images on their way to the engine, decoded and fitted beside it."""

import cv2
import numpy as np
import pytest
from conftest import texture

from models.images import read_training_images
from models.preprocess import fit_to_input
from producers.errors import UnreadableImage
from producers.frame import MAX_PIXELS, Picture
from workers import decoding
from workers.decoding import CpuDecoders


@pytest.fixture
def decoders():
    made = CpuDecoders(2, MAX_PIXELS)
    yield made
    made.shutdown()


def test_an_image_is_fitted_to_the_input_that_it_is_expected_at(decoders):
    picture = Picture.encode(texture(3))
    decoded = decoders.submit(picture, 32).result()
    np.testing.assert_array_equal(decoded.image, picture.decode())
    np.testing.assert_array_equal(decoded.for_input(32), fit_to_input(picture.decode(), 32))


@pytest.mark.parametrize("size", [None, 32])
def test_for_another_input_the_engine_gets_the_whole_image(decoders, size):
    picture = Picture.encode(texture(3))
    np.testing.assert_array_equal(decoders.submit(picture, size).result().for_input(40), picture.decode())


def test_a_large_jpeg_is_reduced_while_it_is_decoded(decoders):
    picture = Picture.encode(texture(3, 480, 640))
    decoded = decoders.submit(picture, 32).result()
    assert decoded.image.shape == (120, 160, 3)
    np.testing.assert_array_equal(decoded.for_input(32), fit_to_input(picture.decode(at_least=64), 32))
    assert np.abs(decoded.for_input(32).astype(int) - fit_to_input(picture.decode(), 32)).max() <= 3
    # a version with another input came between decoding and judging
    np.testing.assert_array_equal(decoded.for_input(120), picture.decode(at_least=240))
    np.testing.assert_array_equal(decoded.for_input(300), picture.decode())


def test_the_first_frame_of_a_product_is_reduced_as_the_next_ones(decoders):
    picture = Picture.encode(texture(3, 480, 640))
    image = decoders.submit(picture, None).result().for_input(32)
    np.testing.assert_array_equal(image, picture.decode(at_least=64))


def test_training_sees_a_large_jpeg_as_serving_does(decoders, tmp_path):
    rng = np.random.default_rng(0)
    noisy = [
        rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((1000, 1300), (257, 300), (80, 9))
    ]
    for index, image in enumerate(noisy):
        picture = Picture.encode(image)
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(picture.data)
        trained, _ = read_training_images([path], 32)
        np.testing.assert_array_equal(trained[0], decoders.submit(picture, 32).result().for_input(32))


def test_what_cannot_be_fitted_is_left_to_the_engine(decoders, monkeypatch):
    def fail(*_):
        raise cv2.error("no memory")

    monkeypatch.setattr(decoding, "fit_to_input", fail)
    picture = Picture.encode(texture(3))
    np.testing.assert_array_equal(decoders.submit(picture, 32).result().for_input(32), picture.decode())


def test_an_unreadable_image_fails_alone(decoders):
    bad, good = (
        decoders.submit(Picture("jpeg", (4, 4, 3), b"none"), 32),
        decoders.submit(Picture.encode(texture(1)), 32),
    )
    with pytest.raises(UnreadableImage):
        bad.result()
    assert good.result().for_input(32).shape == (32, 32, 3)
