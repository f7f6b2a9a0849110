"""The folder of a spool: who may use it, how far it was taken, and which files are in it."""

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from producers.errors import SpoolError
from producers.segment import SUFFIX, Segment

_NUMBER, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


class SpoolFolder:
    """The folder, held for this process alone until `close`.

    Args:
        path: the folder; it is made if it is missing.

    Raises:
        SpoolError: another process holds it, or it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path), contextlib.ExitStack() as stack:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SpoolError(
                    f"another producer uses the spool {path}: give each camera a name of its own, or wait for the other"
                ) from None
            self._position = os.open(path / "position", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.pop_all()

    def position(self) -> int:
        """Number of the newest frame that was taken, 0 if that is not known."""
        noted = os.pread(self._position, _NUMBER.size + _CHECKSUM.size, 0)
        body, checksum = noted[: _NUMBER.size], noted[_NUMBER.size :]
        if len(checksum) < _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
            return 0
        return int(_NUMBER.unpack(body)[0])

    def set_position(self, seq: int) -> None:
        """Note that everything up to number `seq` was taken; it survives the end of the process."""
        body = _NUMBER.pack(seq)
        os.pwrite(self._position, body + _CHECKSUM.pack(zlib.crc32(body)), 0)

    def sync_position(self) -> None:
        """Wait until the position is on the disk."""
        os.fdatasync(self._position)

    def segments(self) -> list[Segment]:
        """The files of records, oldest first; an append that was broken off is cut from the newest."""
        for part in self.path.glob("*.part"):
            part.unlink()
        segments = [Segment(path) for path in sorted(self.path.glob("*" + SUFFIX))]
        if segments:
            segments[-1].cut_tail()
        for segment in segments:
            segment.close()
        return segments

    def new_segment(self, after: Segment | None) -> Segment:
        """An empty file behind all others."""
        segment = Segment(self.path / f"{after.number + 1 if after else 1:010d}{SUFFIX}")
        self.sync()
        return segment

    def sync(self) -> None:
        """Wait until the names of the files are on the disk."""
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._position)
        os.close(self._lock)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one line why the folder cannot be used."""
    try:
        yield
    except OSError as error:
        raise SpoolError(
            f"cannot use the spool {path}: {error.strerror or error}: correct that, or set publish.spool_mb = 0 to go "
            "without"
        ) from None
