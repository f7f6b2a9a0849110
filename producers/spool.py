"""A camera's spool: a bounded queue of frames on disk, in order, that outlives its process.

Folder:
    lock            held by the one process that uses the spool
    position        number of the newest frame that was taken for good, with its checksum
    0000000001.seg  records (see `producers.spooled`), oldest file first; deleted when all of it was taken

Promise: a frame that `append` returned for survives the end of its process, however that ends. It survives a power
cut with `fsync = "always"`; with `"interval"` all but what was appended within the last second do. What a power cut
or a bad disk damages is left out and reported as `Lost`, as far as a record tells its number.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from producers.errors import SpoolFull, SpoolUnwritable
from producers.segment import Segment
from producers.spool_folder import SpoolFolder, disk_errors
from producers.spooled import Header, Lost, Record

_SYNC_S = 1.0
_SEGMENTS = 16  # of a full spool
_SEGMENT_BYTES = 64 << 20
_SAME_RUN = 1 << 20  # numbers of two runs lie further apart, see `producers.sequence`
_UNWRITTEN = 100_000


class Spool:
    """The queue; safe to share between the thread that appends and the one that takes.

    Args:
        folder: the spool's own folder; it is made if it is missing.
        max_bytes: bound of the files. Notes of shed frames may go beyond it, by about 100 bytes each.
        fsync: `always` waits for the disk with each record, `interval` about once a second.

    Raises:
        SpoolError: another process uses the spool, or the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int, fsync: Literal["always", "interval"] = "interval") -> None:
        self._folder, self._max_bytes, self._fsync = SpoolFolder(folder), max_bytes, fsync
        self._segment_bytes = min(max_bytes // _SEGMENTS, _SEGMENT_BYTES)
        self._changed = threading.Condition()
        self._unwritten: deque[Record] = deque()  # notes that the disk did not take yet
        self._offset = 0  # in the oldest segment, of what was not taken yet
        self._sealed = False  # the newest segment takes no more
        self._synced_at, self._unsynced = time.monotonic(), False
        with disk_errors(folder):
            self._taken = self._folder.position()
            self._segments = self._folder.segments()
            self._written = max([self._taken, *(segment.last_seq for segment in self._segments)])
            self._advance()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def empty(self) -> bool:
        """Whether everything that was appended has been taken."""
        with self._changed:
            return self._is_empty()

    @property
    def last_seq(self) -> int:
        """Number of the newest frame that the spool has or had, 0 if it never had one."""
        with self._changed:
            return self._unwritten[-1].seq if self._unwritten else max(self._written, self._taken)

    @property
    def size(self) -> int:
        """Bytes of the files."""
        with self._changed:
            return sum(segment.size for segment in self._segments)

    def waiting(self) -> tuple[int, int]:
        """Frames and notes of shed frames that wait here."""
        with self._changed:
            notes = sum(segment.sheds for segment in self._segments) + len(self._unwritten)
            return sum(segment.frames for segment in self._segments), notes

    def holds(self, seq: int) -> bool:
        """Whether a file has the record of this number, taken or not."""
        with self._changed, disk_errors(self.path):
            place = next((each for each in self._segments if each.last_seq >= seq), None)
            return place is not None and any(header.seq == seq for _, header in place.headers())

    # --- in

    def append(self, record: Record) -> None:
        """Add a frame behind all others.

        Raises:
            SpoolFull: the bound is reached.
            SpoolUnwritable: the disk is full, read-only or broken.
        """
        with self._changed:
            self._write_notes()
            if sum(segment.size for segment in self._segments) + record.size > self._max_bytes:
                raise SpoolFull(f"the spool {self.path} is full")
            self._write(record)
            self._changed.notify_all()

    def could_take(self, record: Record) -> bool:
        """Whether the frame fits into the spool at all."""
        return record.size <= self._max_bytes

    def note(self, record: Record) -> None:
        """Add the note of a shed frame behind all others; in memory for as long as the disk does not take it."""
        with self._changed:
            self._unwritten.append(record)
            with contextlib.suppress(SpoolUnwritable):
                self._write_notes()
            if len(self._unwritten) > _UNWRITTEN:
                self._unwritten.popleft()  # its number is missing then, so it counts as lost
            self._changed.notify_all()

    def shed_oldest(self, reason: str) -> bool:
        """Put notes in the place of the oldest frames, a sixteenth of the spool; whether there was any frame.

        Raises:
            SpoolUnwritable: the disk has no room even for the notes.
        """
        with self._changed:
            place = next((i for i, segment in enumerate(self._segments) if segment.frames), None)
            if place is None:
                return False
            with self._writing():
                notes = self._segments[place].shed(self._taken, reason)
                self._segments[place] = notes
                self._folder.sync()
            if place == 0:
                self._offset = 0
            else:
                notes.close()
            self._sealed |= notes is self._segments[-1]
            self._advance()
            return True

    # --- out

    def peek(self, timeout_s: float = 0.0) -> Record | Lost | None:
        """The oldest record, or which frames before it are lost; None if none comes within the time.

        Raises:
            SpoolError: the disk cannot be read.
        """
        with self._changed, disk_errors(self.path):
            self._changed.wait_for(lambda: not self._is_empty(), timeout_s)
            found = self._advance()
            if found is None:
                return self._unwritten[0] if self._unwritten else None
            offset, header = found
            lost = self._missing_before(header)
            if lost is not None:
                return lost
            record = self._segments[0].record(offset, header)
            return record or Lost(header.seq, header.seq, header.first, header.captured_at_ns)

    def taken(self, seq: int) -> None:
        """Forget everything up to number `seq`: it is published or counted. Space is given back file by file."""
        with self._changed, disk_errors(self.path):
            self._taken = max(self._taken, seq)
            with contextlib.suppress(OSError):  # without it, the ledger still knows what was published
                self._folder.set_position(self._taken)
            self._advance()
            if self._is_empty():  # each waking of a waiting thread costs as much as a record
                self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until all is taken, or for the time; whether it is."""
        with self._changed:
            return self._changed.wait_for(self._is_empty, timeout_s)

    def sync(self) -> None:
        """Write to the disk what was appended more than a second ago; to be called now and then."""
        with self._changed:
            self._sync_if_due()

    def close(self) -> None:
        """Write everything to the disk and let another process have the spool."""
        with self._changed:
            with contextlib.suppress(SpoolUnwritable):
                self._write_notes()
            self._synced_at = float("-inf")
            self._sync_if_due()
            for segment in self._segments:
                segment.close()
            self._folder.close()

    # --- inside, with the lock held

    def _is_empty(self) -> bool:
        return not self._segments and not self._unwritten

    def _advance(self) -> tuple[int, Header] | None:
        """Pass over what was taken and delete files of which all was; the oldest record's offset and header."""
        while self._unwritten and self._unwritten[0].seq <= self._taken:
            self._unwritten.popleft()
        while self._segments:
            oldest = self._segments[0]
            found = oldest.next_header(self._offset)
            if found is None:
                # or else a power cut could bring the file back without what follows, and the position without this
                with contextlib.suppress(OSError):
                    self._folder.sync_position()
                oldest.remove()
                del self._segments[0]
                self._offset = 0
            elif found[1].seq > self._taken:
                return found
            else:
                oldest.count(found[1], -1)
                self._offset = found[0] + found[1].size
        self._sealed = False
        return None

    def _missing_before(self, header: Header) -> Lost | None:
        """Frames that were appended between the one taken last and this record, which is the next that is there."""
        if not 0 < self._taken < header.previous:
            return None
        same_run = header.previous - self._taken < _SAME_RUN
        from_seq = self._taken + 1 if same_run else header.previous
        return Lost(from_seq, header.previous, from_seq, header.captured_at_ns)

    def _write_notes(self) -> None:
        while self._unwritten:
            self._write(self._unwritten[0])
            self._unwritten.popleft()

    def _write(self, record: Record) -> None:
        with self._writing():
            segment = self._segment_to_append()
            size = segment.size
            try:
                segment.append(replace(record, previous=self._written), sync=self._fsync == "always")
            finally:
                self._sealed |= segment.size < size + record.size and segment.size != size  # a part of it is left
        self._written = record.seq
        self._unsynced = self._fsync == "interval"
        self._sync_if_due()

    def _segment_to_append(self) -> Segment:
        newest = self._segments[-1] if self._segments else None
        if newest is None or self._sealed or newest.size >= self._segment_bytes:
            if newest is not None and self._unsynced:
                newest.sync()  # later only the newest is
            if newest is not None and newest is not self._segments[0]:
                newest.close()
            self._segments.append(self._folder.new_segment(newest))
            self._sealed = False
        return self._segments[-1]

    def _sync_if_due(self) -> None:
        if self._unsynced and self._segments and time.monotonic() - self._synced_at >= _SYNC_S:
            with contextlib.suppress(OSError):
                self._segments[-1].sync()
                self._synced_at, self._unsynced = time.monotonic(), False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SpoolUnwritable(f"cannot write to the spool {self.path}: {error.strerror or error}") from None
