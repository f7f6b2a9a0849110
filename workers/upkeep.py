"""The table's upkeep: few large files, rows and evidence no longer than asked for, a log of bounded length.

Files that the table no longer names stay for a day, for readers that opened it before (`table_writer.FOR_READERS`).
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow.fs as pafs
from deltalake import DeltaTable, WriterProperties

from workers import durable
from workers.parquet import GROUP_ROWS, holds_any
from workers.results import HEAVY
from workers.settings import ResultsSettings
from workers.table import TABLE_ERRORS, ResultTable, TableFile
from workers.table_writer import NO_HOOKS, TableWriter

LARGE_BYTES = 128 * 2**20
OPEN_FILES = 64  # so many small files may a day have that is not over
CHECKPOINT_COMMITS = 50
_CLOSED_EVERY = timedelta(hours=1)
_VACUUM_EVERY = timedelta(hours=6)
_WRITING = WriterProperties(compression="ZSTD", max_row_group_size=GROUP_ROWS)
_START = datetime.min.replace(tzinfo=UTC)

logger = logging.getLogger(__name__)

Partition = tuple[str, date]


def _now() -> datetime:
    return datetime.now(UTC)


class Upkeep:
    """Keeps one table in order; a partition at a time, so that it can stop between two.

    Args:
        table: the table.
        settings: how long rows and evidence stay.
        now: the clock.
    """

    def __init__(self, table: ResultTable, settings: ResultsSettings, now: Callable[[], datetime] = _now) -> None:
        self._table, self._settings, self._now = table, settings, now
        self._writer = TableWriter(table)
        self._bare: set[str] = set()  # files that were found to hold no evidence
        self._closed_next = self._vacuum_next = _START

    def run(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Do what is due.

        Args:
            go_on: asked before every commit; false ends the upkeep.

        Raises:
            ResultsUnavailable: the table cannot be read or written; what was done stays done.
        """
        delta = self._table.open()
        if delta is None:
            return
        files = self._table.files(delta)
        steps = [
            *self._row_steps(files),
            *self._evidence_steps(files),
            *self._merge_steps(files),
            *self._vacuum_steps(),
        ]
        for step in steps:
            if not go_on():
                return
            self._writer.change(step)
        self._checkpoint()

    def _before(self, days: int) -> date:
        """The first day that is kept; all frames of the days before it are older than `days`."""
        return self._now().date() - timedelta(days=days)

    # --- what is due, as changes of the table

    def _row_steps(self, files: list[TableFile]) -> list[Callable[[DeltaTable], object]]:
        first = self._before(self._settings.keep_days)
        if not self._settings.keep_days or all(file.day >= first for file in files):
            return []
        logger.info("deleting the rows captured before %s", first)
        return [
            lambda delta: delta.delete(
                f"day < '{first}'", writer_properties=_WRITING, post_commithook_properties=NO_HOOKS
            )
        ]

    def _evidence_steps(self, files: list[TableFile]) -> list[Callable[[DeltaTable], object]]:
        if not self._settings.evidence_days:
            return []
        first = self._before(self._settings.evidence_days)
        kept = self._before(self._settings.keep_days) if self._settings.keep_days else date.min
        due = {
            (file.product, file.day) for file in files if kept <= file.day < first and self._holds_evidence(file.path)
        }
        self._bare &= {file.path for file in files}
        return [self._without_evidence(partition) for partition in sorted(due)]

    def _holds_evidence(self, path: str) -> bool:
        if path in self._bare:
            return False
        try:
            found = holds_any(self._table.fs, f"{self._table.root}/{path}", HEAVY)
        except TABLE_ERRORS as error:
            raise self._table.unavailable("read", error) from None
        if not found:
            self._bare.add(path)
        return found

    def _without_evidence(self, partition: Partition) -> Callable[[DeltaTable], object]:
        product, day = partition
        return lambda delta: delta.update(
            dict.fromkeys(HEAVY, "NULL"),
            predicate=f"product = '{product}' and day = '{day}'",
            writer_properties=_WRITING,
            post_commithook_properties=NO_HOOKS,
        )

    def _merge_steps(self, files: list[TableFile]) -> list[Callable[[DeltaTable], object]]:
        small: dict[Partition, list[int]] = defaultdict(list)
        for file in files:
            if file.size < LARGE_BYTES:
                small[file.product, file.day].append(file.size)
        today, closed_due = self._now().date(), self._now() >= self._closed_next
        if closed_due:
            self._closed_next = self._now() + _CLOSED_EVERY
        return [
            self._merged(partition)
            for partition, sizes in sorted(small.items())
            if len(sizes) >= (2 if partition[1] < today and closed_due else OPEN_FILES)
            and sum(sorted(sizes)[:2]) <= LARGE_BYTES
        ]

    def _merged(self, partition: Partition) -> Callable[[DeltaTable], object]:
        product, day = partition
        return lambda delta: delta.optimize.compact(
            partition_filters=[("product", "=", product), ("day", "=", day.isoformat())],
            target_size=LARGE_BYTES,
            max_concurrent_tasks=1,
            writer_properties=_WRITING,
            post_commithook_properties=NO_HOOKS,
        )

    def _vacuum_steps(self) -> list[Callable[[DeltaTable], object]]:
        if self._now() < self._vacuum_next:
            return []
        self._vacuum_next = self._now() + _VACUUM_EVERY
        return [lambda delta: delta.vacuum(dry_run=False, full=True, post_commithook_properties=NO_HOOKS)]

    # --- the log

    def _checkpoint(self) -> None:
        """Sum up the log now and then, and delete what is older than a day and summed up."""
        delta = self._writer.open_or_create()
        log = f"{self._table.root}/_delta_log"
        try:
            if delta.version() - self._last_checkpoint(log) < CHECKPOINT_COMMITS:
                return
            delta.create_checkpoint()
            if self._table.local:  # before what it sums up may go
                for path in (*Path(log).glob("*.checkpoint*.parquet"), Path(log, "_last_checkpoint"), Path(log)):
                    durable.sync(path)
            delta.cleanup_metadata()
        except TABLE_ERRORS as error:
            raise self._table.unavailable("write", error) from None

    def _last_checkpoint(self, log: str) -> int:
        """The version of the last checkpoint; 0 for none, and for a torn note of it, which the next one replaces."""
        if self._table.fs.get_file_info(f"{log}/_last_checkpoint").type == pafs.FileType.NotFound:
            return 0
        with self._table.fs.open_input_stream(f"{log}/_last_checkpoint") as source:
            note = source.read()
        try:
            return int(json.loads(note)["version"])
        except (ValueError, TypeError, KeyError):
            return 0
