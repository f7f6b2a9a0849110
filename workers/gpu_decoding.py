"""JPEGs decoded on the GPU, a batch in one call; what it cannot read goes to the CPU's decoder, picture by picture."""

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.io import decode_jpeg

from producers.errors import UnreadableImage
from producers.frame import MAX_PIXELS, Picture, header_size

logger = logging.getLogger(__name__)

# A baseline JPEG has one scan, a progressive one about ten; more cost more than they tell.
_MAX_SCANS = 20

# From 1-d uint8 tensors on the CPU to (3, H, W) uint8 RGB on the device; raises RuntimeError if one is unreadable.
BatchDecoder = Callable[[list[Tensor]], list[Tensor]]


def decode_pictures(
    pictures: Sequence[Picture],
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
    decoder: BatchDecoder | None = None,
) -> list[Tensor | UnreadableImage]:
    """Decode JPEGs; each fails alone.

    Args:
        pictures: of any codec; those that are no sound JPEG are decoded on the CPU.
        device: where the images shall lie.
        max_pixels: of an image, see `Picture.decode`.
        decoder: decodes many at once; None takes nvJPEG.

    Returns:
        For each picture, in order, (H, W, 3) uint8 RGB on the device, complete for every stream, or why there is none.
    """
    decoder = decoder or _nvjpeg(device)
    results: list[Tensor | UnreadableImage | None] = [None] * len(pictures)
    sound = [row for row, picture in enumerate(pictures) if _is_sound(picture, max_pixels)]
    for row, image in zip(sound, _decoded([pictures[row].data for row in sound], decoder), strict=True):
        if image is not None and tuple(image.shape) == (3, *pictures[row].shape[:2]):
            results[row] = image.permute(1, 2, 0)
    for row, picture in enumerate(pictures):
        if results[row] is None:
            results[row] = _on_cpu(picture, device, max_pixels)
    if device.type == "cuda":
        # They are read on streams that know nothing of this one.
        torch.cuda.current_stream(device).synchronize()
    return [result for result in results if result is not None]


def _is_sound(picture: Picture, max_pixels: int) -> bool:
    """Whether the GPU may see it: a JPEG of the declared size whose end is there.

    Anything else is for the CPU's decoder, whose checks of hostile bytes say what is wrong.
    """
    if picture.codec != "jpeg" or not picture.data.startswith(b"\xff\xd8") or not picture.data.endswith(b"\xff\xd9"):
        return False
    try:
        size = header_size(picture.data)
    except UnreadableImage:
        return False
    blocks = math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    fits = size == picture.shape[:2] and math.prod(size) <= max_pixels and len(picture.data) >= blocks / 8
    return fits and picture.data.count(b"\xff\xda") <= _MAX_SCANS


def _decoded(jpegs: list[bytes], decoder: BatchDecoder) -> list[Tensor | None]:
    """Decode all at once, and one by one if that fails: a batch tells not which of it is unreadable."""
    encoded = [torch.from_numpy(np.frombuffer(bytearray(each), np.uint8)) for each in jpegs]
    try:
        return list(decoder(encoded)) if encoded else []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if len(encoded) == 1:
            logger.debug("the GPU does not decode a picture: %s", error)
            return [None]
    return [image for each in jpegs for image in _decoded([each], decoder)]


def _on_cpu(picture: Picture, device: torch.device, max_pixels: int) -> Tensor | UnreadableImage:
    try:
        image = picture.decode(max_pixels)
    except UnreadableImage as error:
        return error
    return torch.from_numpy(image if image.flags.writeable else image.copy()).to(device)


def _nvjpeg(device: torch.device) -> BatchDecoder:
    return lambda encoded: decode_jpeg(encoded, mode="RGB", device=device)
