"""The plain way to serve many products: a network of its own for each, teacher included, one product after another."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from models.detector import Student
from models.inference import Network, infer, to_input
from models.teachers import Teacher
from models.training import TrainedStudent


class OwnNetworks:
    """Networks as they were trained, eager, nothing folded and nothing shared; reduced precision runs channels_last.

    Args:
        trained: the student, copied for each product.
        products: how many.
        device: where to compute.
        dtype: the networks' precision.

    Attributes:
        device: likewise.
    """

    def __init__(self, trained: TrainedStudent, products: int, device: torch.device, dtype: torch.dtype) -> None:
        self._detector, self.device, self._dtype = trained.detector, device, dtype
        self._layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        self._networks = [(self._own(trained.teacher), self._own(trained.student)) for _ in range(products)]

    def judge(self, images: Sequence[np.ndarray], products: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Judge a mixed batch product by product.

        Args:
            images: (S, S, 3) uint8 RGB each.
            products: the product's number of each.

        Returns:
            By product, in order, its (B, S, S) float32 maps and (B,) scores.
        """
        results = []
        for product in sorted(set(products)):
            own = [image for image, number in zip(images, products, strict=True) if number == product]
            results.append(self._judge(*self._networks[product], np.stack(own)))
        return results

    @torch.inference_mode()
    def _judge(self, teacher: Teacher, student: Student, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs = to_input(torch.from_numpy(images).to(self.device), teacher, self._dtype)
        inputs = inputs.contiguous(memory_format=self._layout)
        maps, scores = infer(self._detector, student, inputs, teacher(inputs))
        return maps.float().cpu().numpy(), scores.double().cpu().numpy()

    def _own(self, network: Network) -> Network:
        own = copy.deepcopy(network)
        return own.to(device=self.device, dtype=self._dtype, memory_format=self._layout)  # type: ignore[call-overload]
