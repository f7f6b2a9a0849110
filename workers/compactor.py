"""The compactor: folds closed segments into the table, each frame exactly once, whenever it is killed.

Promise: a segment is deleted only after a commit that holds its rows, or after all its frames were found in the
table (`_fold`). Killed before the commit, it has changed nothing; killed after it, the next round finds the frames
in the table and deletes the segment. A second compactor's commit makes this one's fail, and it looks again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from workers.errors import DamagedSegment, Overtaken
from workers.segments import Segments
from workers.table import ResultTable, first_of_each
from workers.table_writer import TableWriter

BATCH_SEGMENTS = 2_000
BATCH_BYTES = 32 * 2**20  # a segment is in memory what it is on disk; a batch needs a few times that
_ATTEMPTS = 5

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Folded:
    """What a round did.

    Attributes:
        segments: that went into the table.
        rows: that were new to it.
        repeats: rows of frames that it held already, or that came twice.
        damaged: segments that were set aside.
        waiting: closed segments that are still to be folded.
    """

    segments: int = 0
    rows: int = 0
    repeats: int = 0
    damaged: int = 0
    waiting: int = 0


class Compactor:
    """Folds the segments of one place.

    Args:
        segments: where rows come from.
        table: where they go.
        reached: told the name of every step as it is reached; tests end the process there.
    """

    def __init__(
        self, segments: Segments, table: ResultTable, reached: Callable[[str], None] = lambda step: None
    ) -> None:
        self._segments, self._table, self._reached = segments, table, reached
        self._writer = TableWriter(table)

    def fold_all(self, go_on: Callable[[Folded], bool] = lambda folded: True) -> Folded:
        """Fold the segments that are closed now, oldest first, in batches of bounded size.

        Args:
            go_on: asked before every batch, with what was done so far; false ends the round.

        Raises:
            ResultsUnavailable: the place cannot be read or written; what was folded stays folded.
            Overtaken: another compactor is faster, again and again.
        """
        closed = self._segments.closed()
        folded = Folded(waiting=len(closed))
        self._reached("listed")
        for batch in _batches(closed):
            if not go_on(folded):
                break
            self._fold(batch, folded)
            folded.waiting -= len(batch)
        go_on(folded)
        return folded

    def _fold(self, batch: Sequence[pafs.FileInfo], folded: Folded) -> None:
        paths, parts = [], []
        for info in batch:
            try:
                rows = self._segments.read(info.path)
            except DamagedSegment as error:
                self._segments.set_aside(info.path)
                logger.error("%s; it was set aside", error)
                folded.damaged += 1
                continue
            if rows is not None:
                paths.append(info.path)
                parts.append(rows)
        self._reached("read")
        if not parts:
            return
        rows = pa.concat_tables(parts)
        new = self._append(first_of_each(rows))
        self._reached("committed")
        for path in paths:
            self._segments.remove([path])
            self._reached("deleted")
        folded.segments += len(paths)
        folded.rows += new
        folded.repeats += rows.num_rows - new

    def _append(self, rows: pa.Table) -> int:
        """Commit the rows whose frames the table lacks; returns how many."""
        for attempt in range(_ATTEMPTS):
            try:
                delta = self._writer.open_or_create()
                new = self._table.absent(delta, rows)
                self._reached("compared")
                if new.num_rows:
                    self._writer.append(delta, new)
                else:
                    self._writer.confirm(delta.version())
                return new.num_rows
            except Overtaken:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def _batches(closed: Sequence[pafs.FileInfo]) -> Iterator[list[pafs.FileInfo]]:
    """Segments in order, together at most as many and as large as one batch may be, and at least one."""
    batch: list[pafs.FileInfo] = []
    size = 0
    for info in closed:
        if batch and (len(batch) >= BATCH_SEGMENTS or size + info.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(info)
        size += info.size
    if batch:
        yield batch
