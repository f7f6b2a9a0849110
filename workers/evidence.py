"""What is kept of a frame beside its numbers: a small quantised map and the image. Pure."""

import zlib

import cv2
import numpy as np
from torch import Tensor

from producers.errors import FrameError
from producers.frame import Frame, Picture
from workers.results import MAP_SIZE
from workers.settings import EvidenceSettings

FAIL, PASS, UNKNOWN = "fail", "pass", "unknown"


def is_kept(frame: Frame, verdict: str, score: float, threshold: float, settings: EvidenceSettings) -> bool:
    """Whether map and image of a frame are kept.

    The sample of passes depends on the frame's name only, so a frame judged twice decides alike.
    """
    if verdict != PASS:
        return True
    if score > threshold * (1 - settings.near):
        return True
    return zlib.crc32(frame.frame_id.encode()) < settings.pass_share * 2**32


def quantised(anomaly_map: np.ndarray) -> tuple[bytes, float, float]:
    """A map (S, S) float32 as 64x64 bytes, row by row, with the values of 0 and 255."""
    small = cv2.resize(anomaly_map, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA)
    low, high = float(small.min()), float(small.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return ((small - low) * scale).round().astype(np.uint8).tobytes(), low, high


def dequantised(map_u8: bytes, low: float, high: float) -> np.ndarray:
    """The 64x64 float32 map that `quantised` made into bytes."""
    levels = np.frombuffer(map_u8, np.uint8).reshape(MAP_SIZE, MAP_SIZE).astype(np.float32)
    return levels * ((high - low) / 255.0) + low


def image_jpeg(picture: Picture, image: np.ndarray | Tensor) -> bytes | None:
    """The image (H, W, 3) uint8 RGB as JPEG: its own bytes where it came as JPEG, so nothing is coded twice.

    None for an image that no JPEG can hold: line cameras take pictures of more than 65,500 lines.
    """
    if picture.codec != "raw" and picture.data.startswith(b"\xff\xd8"):  # some files have another's name
        return picture.data
    try:
        return Picture.encode(image if isinstance(image, np.ndarray) else image.cpu().numpy(), "jpeg").data
    except FrameError:
        return None
