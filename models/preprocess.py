"""The one way from an image to a network's input size, for training, evaluation and serving alike."""

from __future__ import annotations

import cv2
import numpy as np

from models.errors import ModelError


def least_side(size: int) -> int:
    """Return how many pixels the shorter side of a JPEG must keep that is reduced while it is decoded.

    Twice the input: what is fitted then is an average of two pixels at least, as it is of the whole image. In training
    and in serving the same images are reduced alike.

    Args:
        size: Side of a network's input in pixels.
    """
    return 2 * size


def fit_to_input(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the whole image to a square; the aspect ratio is not kept, so nothing is cut off.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: Side of the result in pixels.

    Returns:
        (size, size, 3) uint8 RGB, contiguous; the image itself when it already has that size.

    Raises:
        ModelError: `image` has another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ModelError(f"image: expected (H, W, 3) uint8, found {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    if height == size and width == size:
        return np.ascontiguousarray(image)
    # Area averaging keeps fine defects from aliasing away when shrinking.
    method = cv2.INTER_AREA if height > size or width > size else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=method)
