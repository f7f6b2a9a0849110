"""Rounds of the compactor until told to stop, one compactor at a time, and what it reports of itself."""

import contextlib
import ctypes
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import redis

from workers.compactor import Compactor, Folded
from workers.errors import CompactorBusy, StreamUnavailable, WorkerError
from workers.lease import lease
from workers.reports import write_compactor
from workers.segments import Segments
from workers.settings import ResultsSettings
from workers.table import ResultTable
from workers.upkeep import Upkeep

_REPORT_EVERY_S = 1.0
_LAST_ROUND_S = 20.0  # what is left by then is folded after the next start

logger = logging.getLogger(__name__)


def _give_memory_back() -> None:
    """Return what a round left free: the process only sleeps until the next one, and the C library would keep it."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


class CompactorLoop:
    """The compactor of one place with everything around it.

    Args:
        uri: the results' folder or URI.
        connect: reaches the server that takes the reports, and keeps the lease of results in an object store.
        settings: pauses and retention.
    """

    def __init__(self, uri: str, connect: Callable[[], redis.Redis], settings: ResultsSettings) -> None:
        self._uri, self._connect, self._settings = uri, connect, settings
        self._segments, self._table = Segments(uri), ResultTable(uri)
        self._compactor = Compactor(self._segments, self._table)
        self._upkeep = Upkeep(self._table, settings)
        self._progress = Folded()
        self._figures: dict[str, Any] = {"rows": None, "files": None, "damaged": None, "last_round": None}
        self.trouble: str | None = None

    # --- life

    def run(self, stop: threading.Event) -> None:
        """Work and pause in turn until `stop` is set; then one last round takes what the replicas left.

        A place or server that is away is reported, and the next round tries again.
        """
        reporter = threading.Thread(target=self._report, args=(stop,), name="compactor-report", daemon=True)
        reporter.start()
        while not stop.wait(self._settings.compact_every_s):
            self._try_round(lambda: not stop.is_set())
        give_up_at = time.monotonic() + _LAST_ROUND_S
        self._try_round(lambda: time.monotonic() < give_up_at)
        reporter.join()

    def _try_round(self, go_on: Callable[[], bool]) -> None:
        try:
            self.round(go_on)
        except CompactorBusy:
            logger.info("another compactor works at this moment")
        except WorkerError as error:
            if str(error) != self.trouble:
                logger.error("%s; tried again in %g s", error, self._settings.compact_every_s)
            self.trouble = str(error)
        else:
            self.trouble = None

    def round(self, go_on: Callable[[], bool] = lambda: True) -> Folded:
        """Fold what is closed now, then the upkeep that is due, under the lease.

        Args:
            go_on: asked between two batches; false ends the round early.

        Raises:
            CompactorBusy: another compactor works at this moment.
            ResultsUnavailable: the place cannot be read or written.
            StreamUnavailable: Redis does not answer and holds the lease.
        """
        with lease(self._uri, self._connect) as held:

            def fold_on(folded: Folded) -> bool:
                self._progress = Folded(folded.segments, folded.rows, folded.repeats, folded.damaged, folded.waiting)
                return go_on() and held()

            folded = self._compactor.fold_all(fold_on)
            self._segments.remove_leftovers()
            self._upkeep.run(lambda: go_on() and held())
            self._measure()
        _give_memory_back()
        return folded

    # --- reports

    def _measure(self) -> None:
        delta = self._table.open()
        files = self._table.files(delta) if delta else []
        self._figures = {
            "rows": sum(file.rows for file in files),
            "files": len(files),
            "damaged": len(self._segments.damaged()),
            "last_round": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _report(self, stop: threading.Event) -> None:
        """Tell Redis once a second how the compactor is; the record expires with it."""
        server = self._connect()
        while True:
            try:
                write_compactor(server, self.state())
            except StreamUnavailable as error:
                logger.warning("cannot report: %s", error)
            if stop.wait(_REPORT_EVERY_S):
                return

    def _waiting(self) -> int:
        """Closed segments now; in an object store, where looking costs, at the end of the last round."""
        if "://" in self._uri and not self._uri.startswith("file://"):
            return self._progress.waiting
        try:
            return len(self._segments.closed())
        except WorkerError:
            return self._progress.waiting

    def state(self) -> dict[str, Any]:
        """This compactor's state, see `workers.reports`."""
        return {
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "waiting": self._waiting(),
            **self._figures,
            "trouble": self.trouble,
        }
