"""Reading image files to train on or evaluate."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from models.errors import TrainingDataError
from models.preprocess import fit_to_input, least_side

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 64_000_000
_LIMIT = f"{MAX_PIXELS // 1_000_000} megapixels"


class TrainingImage(BaseModel):
    """One image of a training set, as provenance.

    Attributes:
        id: File name, frame id or whatever names it where it came from.
        sha256: Of the file's bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    sha256: str


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files directly in a folder, sorted by name.

    Raises:
        TrainingDataError: No such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingDataError(f"{folder}: {'is a file, not a folder' if folder.is_file() else 'no such folder'}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise TrainingDataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def read_image(path: str | Path) -> np.ndarray:
    """Read one file as (H, W, 3) uint8 RGB.

    Grey becomes three equal channels, a palette its colours, alpha is dropped, the orientation tag is ignored as in
    serving, and 16-bit values keep their upper 8 bits. Nothing is stretched by what an image happens to hold: two
    images of a product must be scaled alike, or a change of light would vanish and noise become a texture. So a
    camera's 10 or 12 bits that lie at the bottom of 16 come out nearly black; save them in 8 bits, or shifted up.

    Raises:
        TrainingDataError: Missing, empty, corrupt or cut-off file, unknown format, or more than 64
            megapixels.
    """
    return _decode(_read_bytes(Path(path)), str(path))


def read_nonzero(path: str | Path) -> np.ndarray:
    """Read where a file is not black, as (H, W) bool: a mask may mark by 1 of 255, 1 of 65535 or a colour.

    Raises:
        TrainingDataError: As for `read_image`.
    """
    with _opened(_read_bytes(Path(path)), str(path)) as image:
        if image.mode[0] in "IF":
            return np.asarray(image) != 0
        return np.asarray(image.convert("RGB")).max(axis=2) > 0


def image_size(path: str | Path) -> tuple[int, int]:
    """Return a file's (height, width) in pixels as its header says.

    Raises:
        TrainingDataError: As for `read_image`, without a look at the pixels.
    """
    with _opened(_read_bytes(Path(path)), str(path)) as image:
        return image.height, image.width


def read_training_images(paths: Sequence[Path], size: int) -> tuple[np.ndarray, list[TrainingImage]]:
    """Read files and fit them to a network's input.

    Args:
        paths: Image files, at least one.
        size: Side of the square input, pixels.

    Returns:
        (N, size, size, 3) uint8 RGB, and the images' provenance in the same order.

    Raises:
        TrainingDataError: As for `read_image`.
    """
    images = np.empty((len(paths), size, size, 3), np.uint8)
    records = []
    for index, path in enumerate(paths):
        data = _read_bytes(path)
        images[index] = fit_to_input(_decode(data, str(path), least_side(size)), size)
        records.append(TrainingImage(id=path.name, sha256=hashlib.sha256(data).hexdigest()))
    return images, records


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingDataError(f"{path}: {error.strerror or error}") from None
    if not data:
        raise TrainingDataError(f"{path}: the file is empty")
    return data


def _decode(data: bytes, name: str, at_least: int | None = None) -> np.ndarray:
    with _opened(data, name) as image:
        if at_least is not None:  # of JPEGs alone, by the same rule as `producers.frame` and to the same pixels
            image.draft("RGB", (at_least, at_least))
        return _to_rgb(image, name)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image whose pixels are not decoded yet; whatever goes wrong inside is the file's fault."""
    try:
        with warnings.catch_warnings():
            # Of damaged metadata, which does no harm, and of size, which is judged here by our own limit.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise TrainingDataError(f"{name}: {width} x {height} pixels, more than {_LIMIT}")
            yield image
    except Image.DecompressionBombError:
        raise TrainingDataError(f"{name}: more than {_LIMIT}") from None
    except UnidentifiedImageError:
        raise TrainingDataError(f"{name}: not an image of a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise TrainingDataError(f"{name}: corrupt image ({error})") from None


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB; Pillow's own conversion would clip 16-bit grey instead of scaling it."""
    if image.mode == "F":
        raise TrainingDataError(f"{name}: floating-point images have no fixed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = (np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
