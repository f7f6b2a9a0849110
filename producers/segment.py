"""One file of a spool: records one behind the other, only ever appended to."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from producers.spooled import FRAME, HEADER_SIZE, MAGIC, Header, Record

SUFFIX = ".seg"
_LOOK_BYTES = 1 << 20


class Segment:
    """A file of records.

    Args:
        path: the file; it is made if it is missing.

    Attributes:
        size: bytes of the file.
        frames: records of frames that were not taken from here yet.
        sheds: likewise, notes of shed frames.
        last_seq: number of the newest record, 0 without one.

    Raises:
        OSError: of any of the methods, too, as the disk gives it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: int | None = None
        self.size = os.fstat(self._fd).st_size
        self.frames = self.sheds = self.last_seq = 0
        for _, header in self.headers():
            self.count(header, 1)
            self.last_seq = header.seq

    @property
    def number(self) -> int:
        """Place among the files of the spool."""
        return int(self.path.stem)

    @property
    def _fd(self) -> int:
        if self._opened is None:
            self._opened = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return self._opened

    def count(self, header: Header, by: int) -> None:
        """Count a record that came, or with -1 one that was taken."""
        if header.kind == FRAME:
            self.frames += by
        else:
            self.sheds += by

    def append(self, record: Record, *, sync: bool = False) -> None:
        """Add a record, whole or not at all; with `sync`, it is on the disk when this returns."""
        parts, size = record.to_bytes(), self.size
        try:
            written = os.writev(self._fd, parts)
            if written < record.size:
                rest = memoryview(b"".join(parts))
                while written < record.size:
                    written += os.write(self._fd, rest[written:])
            if sync:
                self.sync()
        except OSError:
            # where even this fails, the broken record stays and every reader passes over it
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            self.size = os.fstat(self._fd).st_size
            raise
        self.size += written
        self.frames += record.picture is not None
        self.sheds += record.picture is None
        self.last_seq = record.seq

    def cut_tail(self) -> int:
        """Remove what follows the last readable record, as an append that was broken off leaves; returns its bytes."""
        end = 0
        for offset, header in self.headers():
            end = offset + header.size
        cut = self.size - end
        if cut:
            os.ftruncate(self._fd, end)
            self.size = end
        return cut

    def headers(self, offset: int = 0) -> Iterator[tuple[int, Header]]:
        """Offset and header of each record from `offset` on; what is damaged between them is passed over."""
        while (found := self.next_header(offset)) is not None:
            yield found
            offset = found[0] + found[1].size

    def next_header(self, offset: int) -> tuple[int, Header] | None:
        """Offset and header of the first record at `offset` or behind it, None if there is none."""
        while offset < self.size:
            header = Header.read(os.pread(self._fd, HEADER_SIZE, offset))
            if header is not None and offset + header.size <= self.size:
                return offset, header
            offset = self._next_magic(offset + 1)
        return None

    def record(self, offset: int, header: Header) -> Record | None:
        """The record whose header is at `offset`, None if its body is damaged."""
        return header.record(os.pread(self._fd, header.size - HEADER_SIZE, offset + HEADER_SIZE))

    def shed(self, after: int, reason: str) -> "Segment":
        """Put notes in the place of the frames with numbers above `after`; what was taken already is left out.

        The file is replaced in one step. Returns the segment to go on with.
        """
        part = self.path.with_suffix(".part")
        part.unlink(missing_ok=True)
        notes = Segment(part)
        try:
            for offset, header in self.headers():
                if header.seq > after:
                    old = header.note() if header.kind == FRAME else self.record(offset, header)
                    if old is not None:
                        notes.append(old.shed(old.reason or reason))
            notes.sync()
            part.replace(self.path)
        except OSError:
            notes.close()
            part.unlink(missing_ok=True)
            raise
        notes.path = self.path
        self.close()
        return notes

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file until it is needed again."""
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _next_magic(self, offset: int) -> int:
        while offset < self.size:
            block = os.pread(self._fd, _LOOK_BYTES, offset)
            found = block.find(MAGIC)
            if found >= 0:
                return offset + found
            offset += max(1, len(block) - len(MAGIC) + 1)
        return self.size
