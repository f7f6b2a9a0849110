"""Which normal images are trained on and which are held out for calibration."""

from __future__ import annotations

import hashlib

import numpy as np


def split_holdout(images: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split a set of images by their contents.

    Each image's side follows from its own pixels, so it stays there when the set grows: a student that is
    trained further on more images was never trained on those it is calibrated on. Copies of one image share a
    side.

    Args:
        images: (N, S, S, 3) uint8, N >= 1.
        share: Of the images to hold out, between 0 and 1; met on average.

    Returns:
        Indices to train on and indices held out, int64, both ascending and neither empty. Sets that cannot be
        parted, such as a single image, are used for both.
    """
    draws = np.array([_draw(image) for image in images])
    if draws.min() == draws.max():
        both = np.arange(len(images))
        return both, both
    # At least the lowest draw is held out and at least the highest is trained on.
    held = (draws < share) | (draws == draws.min())
    held &= draws < draws.max()
    return np.flatnonzero(~held), np.flatnonzero(held)


def _draw(image: np.ndarray) -> float:
    """Return a number in [0, 1) that depends on nothing but the pixels."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return int.from_bytes(digest[:8]) / 2**64
