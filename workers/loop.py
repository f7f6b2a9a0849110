"""The inspection loop: entries in, verdicts out, rows made durable, then entries acknowledged.

Promise: an entry is acknowledged only after its row is durable (`_acknowledge`), so a replica that dies at any line
leaves its entries to the next one, and every captured frame ends in exactly one row for a reader.
"""

import logging
import math
import threading
import time

from producers.errors import MalformedEntry
from producers.frame import Frame
from workers.batching import Batcher
from workers.decoding import make_decoders
from workers.engine import Engine, Resident
from workers.errors import NoModel, StreamUnavailable
from workers.judging import Judging, Outcome, Taken
from workers.recording import Recording
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.settings import WorkerSettings
from workers.stream import Entry, FrameStream, VerdictMessage

logger = logging.getLogger(__name__)

_READ_BLOCK_MS = 50
_POLL_S = 0.001
_READY_POLL_S = 0.01
_RETRY_S = 0.5
_HELD_BATCHES = 3


class InspectionLoop:
    """Reads, judges and records frames until told to stop. Knows Redis and Serve only through its arguments.

    Args:
        stream: where entries come from and verdicts go.
        engine: judges.
        residency: says which version judges a product.
        results: where rows are made durable.
        settings: bounds and times.
        replica: this loop's name in the rows.
    """

    def __init__(
        self,
        stream: FrameStream,
        engine: Engine,
        residency: Residency,
        results: SegmentWriter,
        settings: WorkerSettings,
        *,
        replica: str,
    ) -> None:
        self._stream, self._engine, self._residency, self._settings = stream, engine, residency, settings
        self._batcher: Batcher[Taken] = Batcher(settings.max_batch, settings.batch_wait_ms / 1e3)
        self._decoders = make_decoders(settings, engine.device)
        self._judging = Judging(engine, settings.evidence)
        self._recording = Recording(results, settings, replica)
        self._unsent: list[VerdictMessage] = []
        self._next_recovery = 0.0
        self._heard = time.monotonic()
        self.judged = 0
        self._away: str | None = None

    @property
    def heartbeat(self) -> float:
        """When the loop last said that it is alive, on the steady clock. It is not while the engine is silent or the
        disk is: a batch or a write that never ends is a fault.
        """
        return min(self._heard, self._recording.silent_since)

    @property
    def trouble(self) -> str | None:
        """What keeps frames from being read, judged or recorded just now; None if nothing does."""
        return self._away or self._recording.trouble

    # --- life

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop` is set, then drain. A server that is away is waited for, and at first also the place of the
        results: frames that one process after the other takes in vain would end as dead letters.
        """
        while not stop.is_set() and not self._recording.is_ready():
            self._beat()
            stop.wait(_READY_POLL_S)
        while not stop.is_set():
            try:
                self.tick()
                self._away = None
            except StreamUnavailable as error:
                self._say_away(str(error))
                self._beat()
                stop.wait(_RETRY_S)
        self.drain()

    def tick(self) -> None:
        """One round: record what was judged, read, send on its way what is due, acknowledge what is durable, recover
        what others left. Waits for a little while if there is nothing to do.

        Raises:
            StreamUnavailable: Redis does not answer; everything held is kept, so ticking again is safe.
            DeviceFault: the device is broken and no further batch can be judged.
        """
        self._beat()
        self._send()
        if self._judging.await_next(0):
            self._record(self._judging.take())
        came = self._read()
        started = self._start()
        self._recording.advance()
        self._acknowledge()
        if time.monotonic() >= self._next_recovery:
            self._recover()
        if not came and not started:
            self._rest()

    def drain(self) -> None:
        """Take nothing new, finish what is held, acknowledge it, leave the group."""
        try:
            while self._batcher or self._judging:
                while self._batcher and not self._judging.is_full:
                    self._judge(self._batcher.drain())
                self._record(self._judging.take())
            self._send()
            self._recording.finish()
            self._acknowledge()
            self._stream.close()
        except StreamUnavailable as error:
            logger.warning("left %d frames to the next replica: %s", len(self._held()), error)
        finally:
            self._judging.shutdown()
            self._recording.shutdown()
            self._decoders.shutdown()

    def _beat(self) -> None:
        """Say that the loop is alive, unless the engine is silent."""
        if not self._engine_is_silent():
            self._heard = time.monotonic()

    def _say_away(self, trouble: str) -> None:
        if trouble != self._away:
            logger.error("%s", trouble)
        self._away = trouble

    def _engine_is_silent(self) -> bool:
        return len(self._judging) > 0 and not self._judging.await_next(0)

    def _hangs(self) -> bool:
        """Whether engine or disk has been silent for so long that others shall take over what is held here."""
        limit = time.monotonic() - self._settings.claim_idle_ms / 1e3
        return (self._engine_is_silent() and self._heard < limit) or self._recording.silent_since < limit

    def _rest(self) -> None:
        """Wait for the batch under way, or for the next one to be due, or for the rows that are being written."""
        if self._judging:
            self._judging.await_next(max(_POLL_S, self._judging.batch_s / 8))
        elif self._recording.is_writing and not self._batcher:
            self._recording.await_written(_POLL_S)
        else:
            time.sleep(min(self._batcher.wait_s(time.monotonic()) or 0.0, _POLL_S))

    # --- reading

    def _held(self) -> list[Entry]:
        waiting = [taken.entry for taken in self._judging.members() + self._batcher.members()]
        return waiting + self._recording.entries()

    def _room(self) -> int:
        """How many frames may be taken: two batches with the engine and one that is decoded meanwhile, and a bounded
        number of rows that are not durable, so that a full disk stops the reading instead of filling the memory.
        """
        if self._hangs():
            return 0
        room = _HELD_BATCHES * self._settings.max_batch - len(self._batcher) - len(self._judging)
        return min(room, 4 * self._settings.segment_rows - len(self._recording))

    def _read(self) -> bool:
        """Take what there is room for; False if nothing came."""
        room = self._room()
        is_busy = len(self._batcher) + len(self._judging) > 0 or self._recording.is_writing
        if room <= 0:
            if not is_busy:
                time.sleep(_READ_BLOCK_MS / 1e3)
            return False
        # while something comes to an end here, without blocking: Redis ends blocked reads at its timer only, up to
        # 100 ms late, and cameras may wait for what is acknowledged
        entries = self._stream.read(room, 0 if is_busy else _READ_BLOCK_MS)
        self._take(entries)
        return bool(entries)

    def _take(self, entries: list[Entry]) -> None:
        malformed: list[tuple[Entry, str]] = []
        for entry in entries:
            try:
                frame = Frame.from_fields(entry.product, entry.fields)
            except MalformedEntry as error:
                malformed.append((entry, str(error)))
                continue
            resident = self._engine.resident(frame.product)
            image = self._decoders.submit(frame.picture, resident.card.input_size if resident else None)
            self._batcher.add(Taken(entry, frame, image, time.time_ns()), time.monotonic(), self._close_by_s(frame))
        for entry, reason in malformed:
            logger.warning("dead-lettered an entry of %s: %s", entry.product, reason)
            self._stream.dead_letter(entry, "?", reason)

    def _close_by_s(self, frame: Frame) -> float:
        """When the frame's batch must close for its verdict to be in time, on the steady clock."""
        takt_ms = self._settings.takt_of(frame.product)
        if takt_ms is None:
            return math.inf
        left_s = (frame.captured_at_ns - time.time_ns()) / 1e9 + (takt_ms - self._settings.margin_of(takt_ms)) / 1e3
        return time.monotonic() + left_s - 1.5 * self._judging.batch_s

    # --- judging

    def _start(self) -> bool:
        """Send a batch on its way if one is due; False if none is."""
        if self._judging.is_full or (self._judging and not self._may_start_beside()):
            return False
        batch = self._batcher.take(time.monotonic())
        if batch:
            self._judge(batch)
        return bool(batch)

    def _may_start_beside(self) -> bool:
        """Whether a batch may start beside another one: a full one, as what came meanwhile rather waits for company
        than behind it, and without a version to load, as the other's verdicts would wait for that.
        """
        batch = self._batcher.members()[: self._settings.max_batch]
        return len(batch) == self._settings.max_batch and all(
            self._engine.resident(taken.frame.product) for taken in batch
        )

    def _judge(self, batch: list[Taken]) -> None:
        """Have a batch judged by the versions that are in service now: a swap falls between two batches."""
        try:
            residents = self._residents({taken.frame.product for taken in batch})
        except StreamUnavailable:
            self._batcher.put_back(batch, time.monotonic())
            raise
        self._judging.start(batch, residents)

    def _residents(self, products: set[str]) -> dict[str, Resident | NoModel]:
        residents: dict[str, Resident | NoModel] = {}
        for product in products:
            try:
                residents[product] = self._residency.require(product)
            except NoModel as error:
                residents[product] = error
        return residents

    # --- recording

    def _record(self, outcomes: list[Outcome]) -> None:
        """Keep the rows of a batch, one for each frame, and send its verdicts."""
        self._heard = time.monotonic()
        self._unsent += [self._recording.add(outcome) for outcome in outcomes]
        self.judged += len(outcomes)
        self._send()

    def _send(self) -> None:
        """Send verdicts. The line's takt waits for them, so they go before the rows are durable."""
        if self._unsent:
            late = self._stream.send_verdicts(self._unsent)
            self._unsent = []
            self._recording.mark_late(late)

    def _acknowledge(self) -> None:
        """Acknowledge entries whose rows are durable, and none before: it would be lost with this process."""
        if durable := self._recording.durable():
            self._stream.settle(durable)
            self._recording.acknowledged()

    def _recover(self) -> None:
        # a third of the idle limit: an entry held here is refreshed at least twice before another may take it
        self._next_recovery = time.monotonic() + min(1.0, self._settings.claim_idle_ms / 3e3)
        if self._hangs():
            return
        # a disk that others had to leave may be this one's too
        room = 0 if self._recording.is_slow else max(0, self._room())
        entries = self._stream.recover(self._held(), room)
        if entries and len(entries) >= room:  # there may be more
            self._next_recovery = time.monotonic()
        self._take(entries)
