"""Resizing on the device gives what OpenCV gives."""

import numpy as np
import pytest
import torch
from conftest import texture

from models.device_resize import fit_on_device
from models.errors import ModelError
from models.preprocess import fit_to_input


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (128, 128),
        (64, 64),
        (100, 131),
        (65, 300),
        (640, 480),
        (64, 200),
        (50, 200),
        (200, 37),
        (40, 50),
        (64, 50),
        (1, 9),
    ],
)
def test_the_device_resizes_as_opencv_does(height, width):
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for image in (noise, texture(width, height, width)):
        expected = fit_to_input(image, 64)
        found = fit_on_device(torch.from_numpy(image), 64)
        assert (found.shape, found.dtype) == ((64, 64, 3), torch.uint8)
        assert np.abs(found.numpy().astype(int) - expected).max() <= 1


def test_an_image_that_fits_is_left_alone():
    image = torch.from_numpy(texture(1, 64, 64))
    assert fit_on_device(image, 64) is image


def test_many_at_once_are_resized_as_each_alone():
    images = torch.stack([torch.from_numpy(texture(seed, 90, 70)) for seed in range(3)])
    each = torch.stack([fit_on_device(image, 64) for image in images])
    assert torch.equal(fit_on_device(images, 64), each)


def test_strides_do_not_matter():
    image = torch.from_numpy(texture(1, 90, 70))
    planes_first = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(fit_on_device(image, 64), fit_on_device(planes_first, 64))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (0, 4, 3)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ModelError, match=r"expected \(H, W, 3\) uint8"):
        fit_on_device(torch.zeros(shape, dtype=torch.uint8), 64)
