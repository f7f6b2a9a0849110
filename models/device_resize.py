"""`models.preprocess.fit_to_input` on the device: what OpenCV's resize does, as two matrix products an axis each."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError

# Of OpenCV: averages over areas where both axes shrink; where one grows, both are interpolated between those
# neighbours that an area's edge falls between; where none shrinks, between the nearest.
Method = Literal["area", "edges", "linear"]


def fit_on_device(images: Tensor, size: int) -> Tensor:
    """Resize whole images to squares, within 1 grey level of `fit_to_input`.

    Args:
        images: (..., H, W, 3) uint8 RGB of any strides, on any device.
        size: Side of the results in pixels.

    Returns:
        (..., size, size, 3) uint8 RGB on the same device; the images themselves when they already have that size.

    Raises:
        ModelError: `images` has another shape or dtype.
    """
    if images.dim() < 3 or images.shape[-1] != 3 or images.dtype != torch.uint8 or images.numel() == 0:
        raise ModelError(f"image: expected (H, W, 3) uint8, found {tuple(images.shape)} {images.dtype}")
    height, width = images.shape[-3:-1]
    if height == size and width == size:
        return images
    method: Method = "linear" if height <= size and width <= size else "edges"
    if height >= size and width >= size:
        method = "area"
    rows, columns = (_weights(side, size, method, images.device) for side in (height, width))
    planes = rows @ images.movedim(-1, -3).float() @ columns.T
    return planes.round_().clamp_(0, 255).to(torch.uint8).movedim(-3, -1)


@lru_cache(maxsize=64)  # a line's cameras have few image sizes
def _weights(before: int, after: int, method: Method, device: torch.device) -> Tensor:
    """Return (after, before) float32: what each pixel before counts for each pixel after, in sum 1."""
    weights = _area(before, after) if method == "area" else _interpolating(before, after, method)
    return torch.from_numpy(weights.astype(np.float32)).to(device)


def _area(before: int, after: int) -> np.ndarray:
    """Return the share of each new pixel's length that lies on each old pixel."""
    scale = before / after
    start = np.arange(after)[:, None] * scale
    pixel = np.arange(before)[None, :]
    return np.clip(np.minimum(start + scale, pixel + 1) - np.maximum(start, pixel), 0, None) / scale


def _interpolating(before: int, after: int, method: Method) -> np.ndarray:
    """Return the weights of the two old pixels between which each new one lies."""
    scale = before / after
    weights = np.zeros((after, before))
    for pixel in range(after):
        if method == "linear":
            at = (pixel + 0.5) * scale - 0.5
            left, share = math.floor(at), at - math.floor(at)
        else:
            left = math.floor(pixel * scale)
            beyond = pixel + 1 - (left + 1) / scale
            share = beyond - math.floor(beyond) if beyond > 0 else 0.0
        weights[pixel, min(max(left, 0), before - 1)] += 1 - share
        weights[pixel, min(max(left + 1, 0), before - 1)] += share
    return weights
