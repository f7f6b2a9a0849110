"""What varies before a fixed camera: light, contrast, and where the piece comes to rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_GAIN, _OFFSET, _SHIFT = 0.08, 8.0, 2


class CameraAugmentation:
    """Draws brightness, contrast and a small shift for each image; nothing is mirrored or turned.

    Args:
        seed: Of the draws; the same seed yields the same images in the same order of calls.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Return other forms of (B, S, S, 3) uint8 RGB images, of the same shape.

        Contrast changes by up to 8 %, brightness by up to 8 of 255 levels, and the image moves by up to 2 pixels
        in each direction, its border repeated.
        """
        count, size = len(images), images.shape[1]
        gain, offset = (self._uniform(count, bound).to(images.device) for bound in (_GAIN, _OFFSET))
        mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
        lit = (images.float() - mean) * (1 + gain) + mean + offset
        padded = F.pad(lit.permute(0, 3, 1, 2), (_SHIFT,) * 4, mode="replicate")
        moves = torch.randint(0, 2 * _SHIFT + 1, (count, 2), generator=self._generator).tolist()
        moved = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, moves, strict=True)]
        return torch.stack(moved).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _uniform(self, count: int, bound: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=self._generator) * 2 - 1) * bound
