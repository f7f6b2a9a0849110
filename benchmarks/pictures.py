"""Pictures to measure with: soft colours under a sensor's noise, the same ones for everyone. Loads no network."""

from dataclasses import dataclass

import cv2
import numpy as np

from producers.frame import Picture

PICTURES = 16
_NOISE = 2.0  # grey levels


@dataclass(frozen=True)
class Input:
    """What a camera sends.

    Attributes:
        codec: as `producers.frame` has it.
        size: height and width, pixels.
    """

    codec: str
    size: int

    @property
    def name(self) -> str:
        """As documents have it: `jpeg 256`."""
        return f"{self.codec} {self.size}"

    def pictures(self) -> list[Picture]:
        """Return the textures, encoded."""
        return [Picture.encode(image, self.codec) for image in textures(PICTURES, self.size)]


INPUTS = (Input("jpeg", 256), Input("jpeg", 1024), Input("raw", 256))


def textures(count: int, size: int) -> list[np.ndarray]:
    """Return pictures (size, size, 3) uint8 RGB; as JPEG they take about 0.4 bytes a pixel, as a photograph does."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (max(2, size // 32), max(2, size // 32), 3), np.uint8)
        smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
        noise = generator.normal(0, _NOISE, (size, size, 1))
        pictures.append((smooth + noise).clip(0, 255).astype(np.uint8))
    return pictures
