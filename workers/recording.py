"""From outcomes to durable rows, and from those to entries that may be acknowledged.

Segments are written in a thread of their own: a disk that is busy, or a store that is far away, delays no verdict.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from producers.frame import Frame
from workers.daemons import Daemons
from workers.errors import ResultsUnavailable
from workers.evidence import UNKNOWN
from workers.judging import Outcome
from workers.results import Row, SegmentWriter, captured_at
from workers.settings import WorkerSettings
from workers.stream import Entry, Settlement, VerdictMessage

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_SILENT_S = 2.0  # a store that is far away answers within that


@dataclass(frozen=True, slots=True)
class _Record:
    """A row with the entry that is acknowledged once the row is durable; the decoded image is let go of."""

    row: Row
    entry: Entry
    frame: Frame

    @property
    def settlement(self) -> Settlement:
        frame, size = self.frame, len(self.frame.picture.data)
        return Settlement(
            frame.product, self.entry.id, frame.camera, frame.seq, self.row.verdict, size, frame.captured_at_ns
        )


@dataclass(frozen=True, slots=True)
class _Segment:
    """Records whose rows are being written."""

    records: list[_Record]
    since: float
    written: Future[str]


class Recording:
    """Holds what was judged until its rows are durable and its entries acknowledged. Used by one thread.

    Promise: `durable` tells of an entry only after its row has survived whatever comes.

    Args:
        results: where rows are made durable.
        settings: how many rows make a segment, and how long a row waits for it.
        replica: this process's name in the rows.

    Attributes:
        trouble: why rows cannot be written just now; None if they can.
    """

    def __init__(self, results: SegmentWriter, settings: WorkerSettings, replica: str) -> None:
        self._results, self._settings, self._replica = results, settings, replica
        self._thread = Daemons(1, "results")
        self._records: list[_Record] = []  # not given to the thread
        self._first_at = 0.0
        self._segment: _Segment | None = None
        self._check: Future[None] | None = None
        self._check_since = 0.0
        self._durable: list[_Record] = []
        self._not_before = 0.0
        self.trouble: str | None = None

    def __len__(self) -> int:
        """How many entries are held."""
        return len(self._records) + len(self._durable) + (len(self._segment.records) if self._segment else 0)

    @property
    def silent_since(self) -> float:
        """When the write under way began, on the steady clock; infinity if there is none. Any thread may ask."""
        segment = self._segment
        return math.inf if segment is None or segment.written.done() else segment.since

    def is_ready(self) -> bool:
        """Ask whether anything can be written, and say whether the answer was yes; waits for nothing.

        Until it was, frames would be taken in vain; `trouble` tells why.
        """
        now = time.monotonic()
        if self._check is None:
            if now >= self._not_before:
                self._check, self._check_since = self._thread.submit(self._results.check), now
            return False
        if not self._check.done():
            if now - self._check_since > _SILENT_S:
                self._say("the place of the results does not answer; no frames are taken until it does")
            return False
        error, self._check = self._check.exception(), None
        if error is not None:
            self._failed(error, "no frames are taken until they can be written")
            return False
        self.trouble = None
        return True

    @property
    def is_slow(self) -> bool:
        """Whether the write under way takes so long that it may never end."""
        return self.silent_since < time.monotonic() - _SILENT_S

    @property
    def is_writing(self) -> bool:
        """Whether rows are being written, or were and `advance` has not taken note of it."""
        return self._segment is not None

    def await_written(self, timeout_s: float) -> None:
        """Wait until the write under way has come to an end, or so long."""
        if self._segment is not None:
            wait([self._segment.written], timeout_s)

    def entries(self) -> list[Entry]:
        """The entries held, oldest first."""
        under_way = self._segment.records if self._segment else []
        return [record.entry for record in (*self._durable, *under_way, *self._records)]

    def add(self, outcome: Outcome) -> VerdictMessage:
        """Make a frame's row, whatever is wrong with it, hold it, and return the verdict to send."""
        if not self._records:
            self._first_at = time.monotonic()
        row = _row(outcome, self._replica)
        self._records.append(_Record(row, outcome.taken.entry, outcome.taken.frame))
        return _verdict(row, outcome.taken.entry.id)

    def mark_late(self, frame_ids: Collection[str]) -> None:
        """Say in the rows of frames added last that their deadline had passed: they were answered by `unknown`. The
        score that came too late stays beside it.
        """
        for index, record in enumerate(self._records) if frame_ids else ():
            if record.row.frame_id in frame_ids:
                takt_ms = self._settings.takt_of(record.row.product)
                reason = record.row.reason or (f"late: no verdict within {takt_ms:g} ms" if takt_ms else "late")
                self._records[index] = replace(record, row=replace(record.row, verdict=UNKNOWN, reason=reason))

    def advance(self) -> None:
        """Take note of what was written, and have written what is due. Waits for nothing."""
        if self._segment is not None and self._segment.written.done():
            self._end()
        elif self.is_slow:
            self._say("the place of the results does not answer; nothing is acknowledged until it does")
        if self._segment is None and self._is_due():
            self._begin()

    def finish(self) -> None:
        """Have everything written, and wait for it; what cannot be written now stays held."""
        self._await_segment()
        if self._records:
            self._begin()
            self._await_segment()

    def durable(self) -> Sequence[Settlement]:
        """What may be acknowledged."""
        return [record.settlement for record in self._durable]

    def acknowledged(self) -> None:
        """Let go of what was durable."""
        self._durable = []

    def shutdown(self) -> None:
        """End the thread once the write under way is done."""
        self._thread.shutdown(wait=self._check is None)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if not self._records or now < self._not_before:
            return False
        return (
            len(self._records) >= self._settings.segment_rows or now - self._first_at >= self._settings.segment_ms / 1e3
        )

    def _begin(self) -> None:
        records, since, self._records = self._records, time.monotonic(), []
        written = self._thread.submit(self._results.write, [record.row for record in records])
        self._segment = _Segment(records, since, written)

    def _await_segment(self) -> None:
        if self._segment is not None:
            wait([self._segment.written])
            self._end()

    def _end(self) -> None:
        assert self._segment is not None
        records, error, self._segment = self._segment.records, self._segment.written.exception(), None
        if error is None:
            self._durable += records
            self.trouble = None
            return
        self._records, self._first_at = records + self._records, -math.inf
        self._failed(error, "nothing is acknowledged until it can be written")

    def _failed(self, error: BaseException, consequence: str) -> None:
        self._not_before = time.monotonic() + _RETRY_S
        if not isinstance(error, ResultsUnavailable):
            raise error
        self._say(f"{error}; {consequence}")

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.error("%s", trouble)
        self.trouble = trouble


def _row(outcome: Outcome, replica: str) -> Row:
    taken, judgement, frame = outcome.taken, outcome.judgement, outcome.taken.frame
    card = judgement.card if judgement else None
    map_u8, low, high = outcome.map or (None, None, None)
    return Row(
        frame_id=frame.frame_id,
        product=frame.product,
        camera=frame.camera,
        seq=frame.seq,
        captured_at=captured_at(frame.captured_at_ns),
        verdict=outcome.verdict,
        score=outcome.score,
        threshold=card.threshold if card else None,
        model_version=card.version if card else None,
        detector=card.detector.name if card else None,
        reason=outcome.reason,
        queue_ms=(taken.taken_at_ns - frame.captured_at_ns) / 1e6,
        infer_ms=judgement.infer_ms if judgement else 0.0,
        total_ms=(time.time_ns() - frame.captured_at_ns) / 1e6,
        replica=replica,
        map_u8=map_u8,
        map_min=low,
        map_max=high,
        image_jpeg=outcome.image_jpeg,
    )


def _verdict(row: Row, entry_id: bytes) -> VerdictMessage:
    return VerdictMessage(
        product=row.product,
        camera=row.camera,
        seq=row.seq,
        verdict=row.verdict,
        score=math.nan if row.score is None else row.score,
        threshold=math.nan if row.threshold is None else row.threshold,
        model_version=row.model_version or "",
        reason=row.reason or "",
        total_ms=row.total_ms,
        id=entry_id,
    )
