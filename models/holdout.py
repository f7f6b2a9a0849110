"""Which normal images are trained on and which are held out: for calibration by contents, for testing by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

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
    held = _held([image.tobytes() for image in images], share)
    if not held.any():
        both = np.arange(len(images))
        return both, both
    return np.flatnonzero(~held), np.flatnonzero(held)


def split_by_name(paths: Sequence[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Split files by their names, for labelled sets that come without a split of their own.

    A file's side follows from its name alone, so further files move none and two machines agree without
    reading an image. The exception are sets so small that a side would be empty: its nearest file joins it.

    Args:
        paths: Files of different names, at least one.
        share: Of the files to hold out, between 0 and 1; met on average.

    Returns:
        Files to train on and files held out, each in the order given; nothing is held out of a single file.
    """
    held = _held([os.fsencode(path.name) for path in paths], share)
    sided = list(zip(paths, held, strict=True))
    return [path for path, is_held in sided if not is_held], [path for path, is_held in sided if is_held]


def _held(keys: Sequence[bytes], share: float) -> np.ndarray:
    """Return (N,) bool, True where held out: some but not all, or none where all keys are one."""
    draws = np.array([_draw(key) for key in keys])
    # At least the lowest draw is held out and at least the highest is trained on.
    return ((draws < share) | (draws == draws.min())) & (draws < draws.max())


def _draw(key: bytes) -> float:
    """Return a number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64
