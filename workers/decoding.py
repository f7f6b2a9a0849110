"""From pictures to what the engine takes: decoded and fitted in threads, while another batch is judged."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError
from models.preprocess import fit_to_input
from producers.frame import Picture
from workers.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture's image.

    Attributes:
        image: (H, W, 3) uint8 RGB, an array on the host or a tensor on the engine's device.
        fitted: the same, (S, S, 3), where a size was asked for and the image is on the host.
    """

    image: np.ndarray | Tensor
    fitted: np.ndarray | None = None

    def for_input(self, size: int) -> np.ndarray | Tensor:
        """Return the fitted image if it has that size, else the whole one, which the engine fits by itself."""
        return self.image if self.fitted is None or len(self.fitted) != size else self.fitted


class Decoders(Protocol):
    """Decodes pictures in threads of its own."""

    def submit(self, picture: Picture, size: int | None) -> Future[Decoded]:
        """Decode a picture; the future raises UnreadableImage if there is no image in it.

        Args:
            picture: of a frame.
            size: side of the input that it will most likely be judged at, pixels; None if that is not known.
        """

    def shutdown(self) -> None:
        """End the threads once everything submitted is done."""


class CpuDecoders:
    """Decodes and fits pictures on the CPU.

    Args:
        threads: of its own.
        max_pixels: of an image, see `Picture.decode`.
    """

    def __init__(self, threads: int, max_pixels: int) -> None:
        self._threads, self._max_pixels = ThreadPoolExecutor(threads, "decode"), max_pixels

    def submit(self, picture: Picture, size: int | None) -> Future[Decoded]:
        """See Decoders."""
        return self._threads.submit(self._decode, picture, size)

    def shutdown(self) -> None:
        """See Decoders."""
        self._threads.shutdown()

    def _decode(self, picture: Picture, size: int | None) -> Decoded:
        image = picture.decode(self._max_pixels)
        try:
            return Decoded(image, None if size is None else fit_to_input(image, size))
        except (ModelError, cv2.error):  # the engine meets the same, and says it of this frame alone
            return Decoded(image)


def make_decoders(settings: WorkerSettings, device: torch.device) -> Decoders:
    """Return the decoders that the settings ask for, beside an engine on `device`."""
    max_pixels = int(settings.max_megapixels * 1e6)
    on_cpu = CpuDecoders(settings.decode_threads, max_pixels)
    if device.type != "cuda" or not settings.gpu_decode:
        return on_cpu
    from workers.gpu_decoding import GpuDecoders, nvjpeg

    return GpuDecoders(on_cpu, device, settings.max_batch, max_pixels, nvjpeg(device))
