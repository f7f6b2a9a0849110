"""From pictures to what the engine takes: decoded and fitted in threads, while another batch is judged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError
from models.preprocess import fit_to_input, least_side
from producers.frame import Picture
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture's image.

    Attributes:
        image: (H, W, 3) uint8 RGB, an array on the host or a tensor on the engine's device; a JPEG on the host may be
            reduced, see `Picture.decode`.
        fitted: the same, (S, S, 3), where a size was asked for and the image is on the host.
        anew: where the image is on the host, decodes it for an input of another size.
    """

    image: np.ndarray | Tensor
    fitted: np.ndarray | None = None
    anew: Callable[[int], np.ndarray] | None = None

    def for_input(self, size: int) -> np.ndarray | Tensor:
        """Return the fitted image if it has that size, else one that the engine fits by itself."""
        if self.fitted is not None and len(self.fitted) == size:
            return self.fitted
        return self.image if self.anew is None else self.anew(size)


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
        def anew(other: int) -> np.ndarray:
            return picture.decode(self._max_pixels, least_side(other))

        if size is None:
            return Decoded(picture.decode(self._max_pixels), None, anew)
        image = anew(size)
        try:
            return Decoded(image, fit_to_input(image, size), anew)
        except (ModelError, cv2.error):  # the engine meets the same, and says it of this frame alone
            return Decoded(image, None, anew)


def make_decoders(settings: WorkerSettings, device: torch.device) -> Decoders:
    """Return the decoders that the settings ask for, beside an engine on `device`."""
    max_pixels = int(settings.max_megapixels * 1e6)
    on_cpu = CpuDecoders(settings.decode_threads, max_pixels)
    if not settings.gpu_decode:
        return on_cpu
    if device.type != "cuda":
        logger.warning("[worker] gpu_decode: the engine computes on %s, so the CPU decodes", device)
        return on_cpu
    from workers.gpu_decoding import decoders_beside, nvjpeg

    return decoders_beside(on_cpu, device, settings.max_batch, max_pixels, nvjpeg(device))
