"""Normal images with the frozen teacher's features, computed once where they fit a byte budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.detector import NormalBatches
from models.inference import to_input
from models.teachers import Features, Teacher

_CHUNK = 16


class TeacherFeatures(NormalBatches):
    """Batches of normalised images with the teacher's features of them.

    An image that is not augmented has the same features each time, so they may be cached.

    Args:
        teacher: Prepared teacher.
        images: (N, S, S, 3) uint8 RGB.
        cache_bytes: Largest size of the cache; beyond it features are computed anew for each batch.
        augment: Draws other forms of (B, S, S, 3) uint8 images, of the same shape; None takes them as they are.
    """

    def __init__(
        self, teacher: Teacher, images: np.ndarray, cache_bytes: int, augment: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._augment = augment
        *_, parameter = teacher.parameters()  # the first may be more precise than the rest
        self._teacher, self._dtype = teacher, parameter.dtype
        self._images = torch.from_numpy(images).to(parameter.device)
        self._cache: tuple[Tensor, ...] | None = None
        needed = sum(tap.numel() * tap.element_size() for tap in self._compute(self._images[:1])[1]) * len(images)
        if augment is None and needed <= cache_bytes:
            chunks = [self._compute(chunk)[1] for chunk in self._images.split(_CHUNK)]
            # Stored as (N, h, w, C): picking images then keeps the channels_last layout.
            self._cache = tuple(
                torch.cat([tap.permute(0, 2, 3, 1) for tap in taps]) for taps in zip(*chunks, strict=True)
            )

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Features]:
        """Return the images at `indices`.

        Args:
            indices: (B,) int64.

        Returns:
            (B, 3, S, S) normalised images in the teacher's dtype, and the teacher's features of them.
        """
        images = self._images[indices.to(self._images.device)]
        if self._augment is not None:
            images = self._augment(images)
        if self._cache is None:
            return self._compute(images)
        picked = tuple(tap[indices.to(tap.device)].permute(0, 3, 1, 2) for tap in self._cache)
        return to_input(images, self._teacher, self._dtype), picked

    def chunks(self) -> list[Tensor]:
        """Return all indices in order, in parts of a batch each."""
        return list(torch.arange(len(self)).split(_CHUNK))

    # Not inference_mode: autograd must be able to save the features for the student's backward pass.
    @torch.no_grad()
    def _compute(self, images: Tensor) -> tuple[Tensor, Features]:
        inputs = to_input(images, self._teacher, self._dtype)
        return inputs, self._teacher(inputs)
