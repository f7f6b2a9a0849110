"""A frame: one captured image with its origin, and its form on the wire.

Wire form (fields of an entry in `frames:{product}`, version 1):
    v               b"1"
    camera          name
    seq             int, stamped at capture, never reused by the camera
    captured_at_ns  int, nanoseconds since the epoch (UTC)
    codec           jpeg | png | raw
    shape           "height,width,channels" of the decoded image
    data            the encoded image; raw is C-contiguous uint8, RGB or grey
"""

import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
from PIL import Image

from producers.errors import FrameError, MalformedEntry, UnreadableImage

VERSION = 1
MAX_PIXELS = 64_000_000
LARGEST_PIXELS = 178_000_000  # no decoder takes more
CODECS = ("jpeg", "png", "raw")
_CODECS = {name.encode(): name for name in CODECS}
_JPEG = b"\xff\xd8"
_PRODUCT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_CAMERA = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MAX_INT64 = 2**63 - 1
_MAX_NAME = 63
_MAX_SHAPE = 32  # characters of a declared shape
# Each scan of a progressive JPEG costs a pass over all pixels: real ones have about ten, a thumbnail a few more.
_MAX_SCANS = 200
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_READ_AT = {  # the reduction alone: grey is what the absence of a colour's flag means
    1: _RGB,
    2: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def check_product(name: str) -> str:
    """Return `name` if it is a product's name, else raise FrameError."""
    if not _PRODUCT.fullmatch(name):
        raise FrameError(
            f"product {name[:80]!r} is not a valid name: 1 to 63 of a-z, 0-9, '_' and '-', a letter or digit first"
        )
    return name


def check_camera(name: str) -> str:
    """Return `name` if it is a camera's name, else raise FrameError."""
    if not _CAMERA.fullmatch(name):
        raise FrameError(
            f"camera {name[:80]!r} is not a valid name: 1 to 63 letters, digits, '_', '.', '-', a letter or digit first"
        )
    return name


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in its wire codec.

    Attributes:
        codec: `jpeg`, `png` or `raw`.
        shape: (height, width, channels) of the image; channels is 1 for a grey image, else 3.
        data: the encoded bytes.
    """

    codec: str
    shape: tuple[int, int, int]
    data: bytes

    @classmethod
    def encode(cls, image: np.ndarray, codec: str = "jpeg", jpeg_quality: int = 95) -> Self:
        """Encode an image (H, W, 3) uint8 RGB.

        Raises:
            FrameError: the array is no such image, or the codec is unknown.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise FrameError(f"expected an image (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        shape = (int(height), int(width), 3)
        if codec == "raw":
            return cls(codec, shape, np.ascontiguousarray(image).tobytes())
        if codec not in CODECS:
            raise FrameError(f"codec {codec!r} is unknown; use one of {', '.join(CODECS)}")
        # 4:4:4: chroma subsampling would blur thin coloured defects
        options = [
            cv2.IMWRITE_JPEG_QUALITY,
            jpeg_quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
        done, data = cv2.imencode(
            ".jpg" if codec == "jpeg" else ".png",
            cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
            options if codec == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1],
        )
        if not done:
            raise FrameError(f"the image of {width}x{height} could not be encoded as {codec}")
        return cls(codec, shape, data.tobytes())

    def decode(self, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> np.ndarray:
        """Decode to an image (H, W, 3) uint8 RGB.

        The size is read from the image's header before any pixel is decoded, so that a decompression bomb
        costs nothing.

        Args:
            max_pixels: of the image as it was encoded.
            at_least: a JPEG may come at a half, a quarter or an eighth of its size as long as both sides keep so many
                pixels, which takes little more than half of the time; None for the whole size. A block of 8 x 8
                pixels keeps its mean: the reduction is part of the inverse cosine transform.

        Raises:
            UnreadableImage: unknown codec, no or corrupt data, too many pixels, or not of the declared shape.
        """
        if not self.data:
            raise UnreadableImage("the image is empty (0 bytes)")
        if self.codec == "raw":
            return self._decode_raw(max_pixels)
        if self.codec not in CODECS:
            raise UnreadableImage(f"codec {self.codec!r} is unknown")
        height, width = header_size(self.data)
        _check_pixels(height, width, max_pixels)
        if (height, width) != self.shape[:2] or self.shape[2] not in (1, 3):
            raise UnreadableImage(f"declared as shape {_listed(self.shape)}, its data holds {height},{width},3")
        reduction = 1
        if self.data.startswith(_JPEG):
            check_jpeg(self.data, height, width)
            if at_least is not None:
                reduction = _reduction(min(height, width), at_least)
        image = _decode_pixels(self.data, reduction)
        if image is None or image.shape != (math.ceil(height / reduction), math.ceil(width / reduction), 3):
            raise UnreadableImage(f"corrupt {self.codec} data ({len(self.data)} bytes)")
        return image

    def _decode_raw(self, max_pixels: int) -> np.ndarray:
        height, width, channels = self.shape
        if channels not in (1, 3) or height < 1 or width < 1:
            raise UnreadableImage(f"raw shape {_listed(self.shape)} is not height,width,1 or height,width,3")
        _check_pixels(height, width, max_pixels)
        if len(self.data) != height * width * channels:
            raise UnreadableImage(f"raw data of {len(self.data)} bytes does not fill the shape {_listed(self.shape)}")
        image = np.frombuffer(self.data, np.uint8).reshape(height, width, channels)
        return np.repeat(image, 3, axis=2) if channels == 1 else image


def header_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header of a JPEG or PNG, without decoding it.

    Raises:
        UnreadableImage: the header is not that of a JPEG or PNG.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                return image.height, image.width
    except Image.DecompressionBombError:
        raise UnreadableImage("the image has more than 178 megapixels") from None
    except Exception:  # the border to parsers of hostile bytes, whose errors are of any kind
        raise UnreadableImage(f"not an image: {len(data)} bytes of corrupt or unknown data") from None


def _reduction(side: int, at_least: int) -> int:
    """By how much an image's shorter side can be divided: 8, 4, 2 or 1. Pillow's `draft` chooses alike."""
    return next((by for by in (8, 4, 2) if side // at_least >= by), 1)


def _decode_pixels(data: bytes, reduction: int) -> np.ndarray | None:
    """Decode to RGB, None for corrupt data. A truncated JPEG is corrupt: half a picture must not pass."""
    if data.startswith(_JPEG) and _is_cut_off(data):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), _READ_AT[reduction])
    except cv2.error:
        return None


def check_jpeg(jpeg: bytes, height: int, width: int) -> None:
    """Refuse what costs far more than its bytes: the coding takes a bit at least for each 8 x 8 pixels of an image.

    Raises:
        UnreadableImage: the JPEG is hollow or has too many scans.
    """
    if len(jpeg) < math.ceil(height / 8) * math.ceil(width / 8) / 8:
        raise UnreadableImage(f"{width}x{height} pixels are declared, more than {len(jpeg)} bytes can hold")
    octets = np.frombuffer(jpeg, np.uint8)  # five times as fast as bytes.count, and other threads go on meanwhile
    scans = np.count_nonzero((octets[:-1] == 0xFF) & (octets[1:] == 0xDA))
    if scans > _MAX_SCANS:
        raise UnreadableImage(f"the jpeg has {scans} scans, more than the {_MAX_SCANS} allowed")


def _is_cut_off(jpeg: bytes) -> bool:
    """Whether no end of image follows the pixels; bytes behind it, as cameras pad their buffers with, do not matter."""
    end, pixels = b"\xff\xd9", b"\xff\xda"
    return not jpeg.endswith(end) and jpeg.rfind(end) < jpeg.rfind(pixels)


def _listed(shape: tuple[int, int, int]) -> str:
    return ",".join(str(n) for n in shape)


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} = {height * width / 1e6:.0f} megapixels, more than the {max_pixels / 1e6:.0f} allowed"
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """One image with its origin. Validated here, trusted afterwards.

    Attributes:
        product: what is inspected.
        camera: the source.
        seq: sequence number of the camera, stamped at capture and never reused.
        captured_at_ns: capture time, nanoseconds since the epoch (UTC).
        picture: the image in its wire codec.
    """

    product: str
    camera: str
    seq: int
    captured_at_ns: int
    picture: Picture

    def __post_init__(self) -> None:
        check_product(self.product)
        check_camera(self.camera)
        if not 0 <= self.seq <= _MAX_INT64 or not 0 <= self.captured_at_ns <= _MAX_INT64:
            raise FrameError(f"seq {self.seq} or captured_at_ns {self.captured_at_ns} is not a positive int64")

    @property
    def frame_id(self) -> str:
        """`product/camera/seq`: names this frame everywhere, for ever."""
        return f"{self.product}/{self.camera}/{self.seq}"

    def to_fields(self) -> dict[str, str | int | bytes]:
        """The entry's fields on the wire."""
        return {
            "v": VERSION,
            "camera": self.camera,
            "seq": self.seq,
            "captured_at_ns": self.captured_at_ns,
            "codec": self.picture.codec,
            "shape": _listed(self.picture.shape),
            "data": self.picture.data,
        }

    @classmethod
    def from_fields(cls, product: str, fields: Mapping[bytes, bytes]) -> Self:
        """Read an entry's fields. Whether the data is the image that they declare is left to `Picture.decode`.

        Raises:
            MalformedEntry: the entry names no version, camera, sequence number, capture time, codec or shape that can
                be, so no camera of ours made it.
        """
        version = fields.get(b"v")
        if version != str(VERSION).encode():
            raise MalformedEntry(f"wire version {_shown(version)} is not {VERSION}")
        try:
            return cls(
                product=product,
                camera=_text(fields, b"camera"),
                seq=_integer(fields, b"seq"),
                captured_at_ns=_integer(fields, b"captured_at_ns"),
                picture=Picture(_codec(fields), _shape(fields), fields.get(b"data", b"")),
            )
        except FrameError as error:
            raise MalformedEntry(str(error)) from None


def _shown(value: bytes | None) -> str:
    return "(missing)" if value is None else repr(value[:40])


def _text(fields: Mapping[bytes, bytes], name: bytes) -> str:
    value = fields.get(name)
    try:
        return (value or b"")[: _MAX_NAME + 1].decode("ascii")
    except UnicodeDecodeError:
        raise MalformedEntry(f"field {name.decode()} is {_shown(value)}, not a name") from None


def _codec(fields: Mapping[bytes, bytes]) -> str:
    codec = fields.get(b"codec")
    if codec not in _CODECS:
        raise MalformedEntry(f"field codec is {_shown(codec)}, not one of {', '.join(CODECS)}")
    return _CODECS[codec]


def _integer(fields: Mapping[bytes, bytes], name: bytes) -> int:
    value = fields.get(name)
    if value is None or len(value) > 19 or not value.isdigit():
        raise MalformedEntry(f"field {name.decode()} is {_shown(value)}, not a positive integer")
    return int(value)


def _shape(fields: Mapping[bytes, bytes]) -> tuple[int, int, int]:
    declared = fields.get(b"shape")
    parts = (declared or b"")[: _MAX_SHAPE + 1].split(b",")
    if len(parts) == 3 and all(part.isdigit() and len(part) <= 9 for part in parts):
        height, width, channels = (int(part) for part in parts)
        unread = height == width == 0  # a source found no header that could be read
        if channels in (1, 3) and (unread or 0 < height * width <= LARGEST_PIXELS):
            return (height, width, channels)
    most = LARGEST_PIXELS // 10**6
    raise MalformedEntry(
        f"field shape is {_shown(declared)}, not height,width,1 or height,width,3 of up to {most} megapixels"
    )
