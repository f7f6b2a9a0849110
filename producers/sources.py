"""Where pictures come from: folders of images and video files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from producers.errors import SourceError, UnreadableImage
from producers.frame import Picture, header_size
from producers.settings import PublisherSettings

_PASSED_THROUGH = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}
_DECODED = (".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
IMAGE_SUFFIXES = (*_PASSED_THROUGH, *_DECODED)
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mjpeg")


class Source(Protocol):
    """Yields pictures, one pass; iterate again for another pass."""

    def __iter__(self) -> Iterator[Picture]:
        """Start a pass."""
        ...

    def __len__(self) -> int:
        """Pictures of a pass; 0 if that is not known."""
        ...


class FolderSource:
    """The images of a folder in the order of their names.

    JPEG and PNG files travel as they are, so that nothing is lost by coding twice, and so that a corrupt file
    gets its `unknown` verdict like any other unreadable frame instead of vanishing here.

    Raises:
        SourceError: no such folder, not readable, or no image in it.
    """

    def __init__(self, folder: Path, settings: PublisherSettings) -> None:
        self._settings = settings
        try:
            self.paths = sorted(
                path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            )
        except OSError as error:
            raise SourceError(f"cannot read the folder {folder}: {error.strerror}") from None
        if not self.paths:
            raise SourceError(f"no image in {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Picture]:
        for path in self.paths:
            yield self.read(path)

    def read(self, path: Path) -> Picture:
        """One file as a picture; a file that is no image becomes a picture that will not decode."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from None
        codec = _PASSED_THROUGH.get(path.suffix.lower())
        if codec is None:
            image = _decoded(data)
            if image is not None:
                return Picture.encode(image, self._settings.codec, self._settings.jpeg_quality)
            codec = "png"
        try:
            height, width = header_size(data)
        except UnreadableImage:
            height, width = 0, 0
        return Picture(codec, (height, width, 3), data)


def _decoded(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB of a file's bytes, None if OpenCV cannot make an image of them."""
    if not data:
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None


class VideoSource:
    """The frames of a video file.

    Raises:
        SourceError: no such file, or not a video that this machine can decode.
    """

    def __init__(self, path: Path, settings: PublisherSettings) -> None:
        self._path, self._settings = path, settings
        capture = self._open()
        self._length = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.fps = float(capture.get(cv2.CAP_PROP_FPS))
        capture.release()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Picture]:
        capture = self._open()
        try:
            while True:
                more, image = capture.read()
                if not more:
                    return
                rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                yield Picture.encode(rgb, self._settings.codec, self._settings.jpeg_quality)
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        if not self._path.is_file():
            raise SourceError(f"no such video: {self._path}")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what is wrong is said below, in one line
        capture = cv2.VideoCapture(str(self._path))
        if not capture.isOpened():
            raise SourceError(f"cannot decode {self._path} as a video")
        return capture


def open_source(location: str, settings: PublisherSettings) -> Source:
    """A source by its location: a folder of images or a video file.

    Raises:
        SourceError: nothing there, or not something that shows pictures.
    """
    path = Path(location)
    if path.is_dir():
        return FolderSource(path, settings)
    if not path.exists():
        raise SourceError(f"no such folder or video: {location}")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoSource(path, settings)
    raise SourceError(f"{location} is neither a folder of images nor a video ({', '.join(VIDEO_SUFFIXES)})")
