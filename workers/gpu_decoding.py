"""JPEGs decoded on the GPU, as many at once as wait; what it cannot read goes to the CPU's decoders."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from torch import Tensor

from producers.errors import UnreadableImage
from producers.frame import Picture, check_jpeg, header_size
from workers.decoding import Decoded, Decoders
from workers.graphs import capturing
from workers.streams import Stream

logger = logging.getLogger(__name__)

# A baseline JPEG has one scan, a progressive one about ten; more cost more than they tell.
_MAX_SCANS = 20

# From 1-d uint8 tensors on the CPU to (3, H, W) uint8 RGB on the device; raises RuntimeError if one is unreadable.
BatchDecoder = Callable[[list[Tensor]], list[Tensor]]


# A picture, the input that it is expected at, and the future that waits for it.
_Waiting = tuple[Picture, int | None, Future[Decoded]]


class GpuDecoders:
    """Decodes JPEGs on the GPU and all other pictures on the CPU.

    While graphs are captured the GPU must not be disturbed: what waits then is decoded on the CPU.

    Args:
        on_cpu: decoders for the rest.
        device: of the engine.
        max_batch: most pictures at once.
        max_pixels: of an image, see `Picture.decode`.
        decoder: decodes many at once.
    """

    def __init__(
        self, on_cpu: Decoders, device: torch.device, max_batch: int, max_pixels: int, decoder: BatchDecoder
    ) -> None:
        self._on_cpu, self._max_batch, self._max_pixels = on_cpu, max_batch, max_pixels
        self._decoder, self._stream = decoder, Stream(device)
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gpu-decode", daemon=True)
        self._thread.start()

    def submit(self, picture: Picture, size: int | None) -> Future[Decoded]:
        """See Decoders; on the device an image stays as large as it is."""
        if picture.codec != "jpeg":
            return self._on_cpu.submit(picture, size)
        future: Future[Decoded] = Future()
        self._waiting.put((picture, size, future))
        return future

    def shutdown(self) -> None:
        """See Decoders."""
        self._waiting.put(None)
        self._thread.join()
        self._on_cpu.shutdown()

    def _work(self) -> None:
        ended = False
        while not ended:
            taken = [self._waiting.get()]
            while len(taken) < self._max_batch and not self._waiting.empty():
                taken.append(self._waiting.get())
            ended = None in taken
            self._settle([each for each in taken if each is not None])

    def _settle(self, batch: list[_Waiting]) -> None:
        """Give each future its image or the error that there was."""
        try:
            images = self._decode([picture for picture, _, _ in batch])
            for (picture, size, future), image in zip(batch, images, strict=True):
                if image is None:
                    self._on_cpu.submit(picture, size).add_done_callback(partial(_pass_on, to=future))
                else:
                    future.set_result(Decoded(image))
        except Exception as error:  # the thread lives on for the next
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(error)

    def _decode(self, pictures: list[Picture]) -> list[Tensor | None]:
        """Return (H, W, 3) uint8 RGB images on the device, complete for every stream, None where there is none."""
        results: list[Tensor | None] = [None] * len(pictures)
        sound = [row for row, picture in enumerate(pictures) if is_sound_jpeg(picture, self._max_pixels)]
        if not sound or not capturing.acquire(blocking=False):
            return results
        try:
            with self._stream.use():
                images = decoded([pictures[row].data for row in sound], self._decoder)
            self._stream.finish()
        except Exception as error:  # out of memory, or broken, which the engine finds out for itself
            logger.warning("%d pictures are decoded on the CPU: %s", len(sound), str(error).partition("\n")[0])
            return results
        finally:
            capturing.release()
        for row, image in zip(sound, images, strict=True):
            if image is not None and tuple(image.shape) == (3, *pictures[row].shape[:2]):
                results[row] = image.permute(1, 2, 0)
        return results


def decoders_beside(
    on_cpu: Decoders, device: torch.device, max_batch: int, max_pixels: int, decoder: BatchDecoder
) -> Decoders:
    """Return decoders as `GpuDecoders` describes them, or those of the CPU alone where the GPU decodes no JPEG."""
    picture = Picture.encode(np.zeros((16, 16, 3), np.uint8), "jpeg")
    try:
        with capturing:
            decoder([torch.from_numpy(np.frombuffer(bytearray(picture.data), np.uint8))])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        logger.warning("[worker] gpu_decode: %s decodes no JPEG, so the CPU does: %s", device, reason)
        return on_cpu
    return GpuDecoders(on_cpu, device, max_batch, max_pixels, decoder)


def is_sound_jpeg(picture: Picture, max_pixels: int) -> bool:
    """Whether the GPU may see it: a JPEG of the declared size whose end is there.

    Anything else is for the CPU's decoder, whose checks of hostile bytes say what is wrong.
    """
    data = picture.data
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return False
    try:
        height, width = header_size(data)
        check_jpeg(data, height, width)
    except UnreadableImage:
        return False
    declared = (height, width) == picture.shape[:2] and picture.shape[2] in (1, 3)
    return declared and height * width <= max_pixels and data.count(b"\xff\xda") <= _MAX_SCANS


def decoded(jpegs: Sequence[bytes], decoder: BatchDecoder) -> list[Tensor | None]:
    """Decode all at once, and one by one if that fails: a batch tells not which of it is unreadable.

    Returns:
        For each JPEG (3, H, W) uint8 RGB, None if the decoder cannot read it.

    Raises:
        torch.OutOfMemoryError: the device has no room for one of them.
    """
    encoded = [torch.from_numpy(np.frombuffer(bytearray(each), np.uint8)) for each in jpegs]
    try:
        return list(decoder(encoded)) if encoded else []
    except torch.OutOfMemoryError:
        if len(encoded) == 1:
            raise
    except RuntimeError as error:
        if len(encoded) == 1:
            logger.debug("the GPU does not decode a picture: %s", error)
            return [None]
    return [image for each in jpegs for image in decoded([each], decoder)]


def nvjpeg(device: torch.device) -> BatchDecoder:
    """Return NVIDIA's decoder on a device."""
    from torchvision.io import decode_jpeg

    return lambda encoded: decode_jpeg(encoded, mode="RGB", device=device)


def _pass_on(done: Future[Decoded], to: Future[Decoded]) -> None:
    error = done.exception()
    if error is None:
        to.set_result(done.result())
    else:
        to.set_exception(error)
