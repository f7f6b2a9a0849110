"""The inspection loop: entries in, verdicts out, rows made durable, then entries acknowledged.

Promise: an entry is acknowledged only after its row is durable (`_commit`), so a replica that dies at any line
leaves its entries to the next one, and every captured frame ends in exactly one row for a reader.
"""

import logging
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

from models.calibration import is_fail
from producers.errors import MalformedEntry, UnreadableImage
from producers.frame import Frame
from workers import evidence
from workers.batching import Batcher
from workers.decoding import Decoded, make_decoders
from workers.engine import Engine, Judgement, Request, Resident
from workers.errors import DeviceFault, NoModel, ResultsUnavailable, StreamUnavailable
from workers.evidence import FAIL, PASS, UNKNOWN
from workers.residency import Residency
from workers.results import Row, SegmentWriter, captured_at
from workers.settings import WorkerSettings
from workers.stream import Entry, FrameStream, Settlement, VerdictMessage

logger = logging.getLogger(__name__)

_READ_BLOCK_MS = 50
_POLL_S = 0.001
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class _Taken:
    """An entry on its way: its frame and the image that a decoding thread makes of it."""

    entry: Entry
    frame: Frame
    image: "Future[Decoded]"
    taken_at_ns: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one taken frame."""

    taken: _Taken
    judgement: Judgement | None
    reason: str | None


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
        self._stream, self._engine, self._residency = stream, engine, residency
        self._results, self._settings, self._replica = results, settings, replica
        self._batcher: Batcher[_Taken] = Batcher(settings.max_batch, settings.batch_wait_ms / 1e3)
        self._decoders = make_decoders(settings, engine.device)
        self._rows: list[Row] = []
        self._row_entries: list[tuple[Entry, Settlement]] = []
        self._durable: list[tuple[Entry, Settlement]] = []
        self._unsent: list[VerdictMessage] = []
        self._rows_since = 0.0
        self._next_commit = 0.0
        self._next_recovery = 0.0
        self._judge_s = 0.0  # what a batch takes, smoothed
        self.heartbeat = time.monotonic()
        self.judged = 0
        self._away: str | None = None
        self._unwritten: str | None = None

    @property
    def trouble(self) -> str | None:
        """What keeps frames from being read, judged or recorded just now; None if nothing does."""
        return self._away or self._unwritten

    # --- life

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop` is set, then drain. A server that is away is waited for."""
        while not stop.is_set():
            try:
                self.tick()
                self._away = None
            except StreamUnavailable as error:
                self._away = _logged(str(error), self._away)
                self.heartbeat = time.monotonic()
                stop.wait(_RETRY_S)
        self.drain()

    def tick(self) -> None:
        """One round: read, judge what is due, commit what is due, recover what others left.

        Raises:
            StreamUnavailable: Redis does not answer; everything held is kept, so ticking again is safe.
        """
        self.heartbeat = time.monotonic()
        self._send()
        self._read()
        batch = self._batcher.take(time.monotonic())
        if batch:
            self._judge(batch)
        if self._commit_is_due():
            self._commit()
        if time.monotonic() >= self._next_recovery:
            self._recover()

    def drain(self) -> None:
        """Take nothing new, finish what is held, acknowledge it, leave the group."""
        try:
            while batch := self._batcher.drain():
                self._judge(batch)
            self._send()
            self._commit()
            self._stream.close()
        except StreamUnavailable as error:
            logger.warning("left %d frames to the next replica: %s", len(self._held()), error)
        finally:
            self._decoders.shutdown()

    # --- reading

    def _held(self) -> list[Entry]:
        waiting = [taken.entry for taken in self._batcher.members()]
        return waiting + [entry for entry, _ in self._row_entries + self._durable]

    def _room(self) -> int:
        """How many frames may be taken: one batch decodes while one is judged, and a bounded number of rows
        waits, so that a full disk stops the reading instead of filling the memory.
        """
        room = 2 * self._settings.max_batch - len(self._batcher)
        return min(room, 4 * self._settings.segment_rows - len(self._rows) - len(self._durable))

    def _read(self) -> None:
        room = self._room()
        if room <= 0:
            if not len(self._batcher):
                time.sleep(_READ_BLOCK_MS / 1e3)
            return
        wait_s = self._batcher.wait_s(time.monotonic())
        if wait_s is None:
            self._take(self._stream.read(room, _READ_BLOCK_MS))
            return
        # while a batch waits, without blocking: Redis ends blocked reads at its timer only, up to 100 ms late
        entries = self._stream.read(room, 0)
        self._take(entries)
        if not entries:
            time.sleep(min(wait_s, _POLL_S))

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
            self._batcher.add(_Taken(entry, frame, image, time.time_ns()), time.monotonic(), self._close_by_s(frame))
        for entry, reason in malformed:
            logger.warning("dead-lettered an entry of %s: %s", entry.product, reason)
            self._stream.dead_letter(entry, "?", reason)

    def _close_by_s(self, frame: Frame) -> float:
        """When the frame's batch must close for its verdict to be in time, on the steady clock."""
        takt_ms = self._settings.takt_of(frame.product)
        if takt_ms is None:
            return math.inf
        left_s = (frame.captured_at_ns - time.time_ns()) / 1e9 + (takt_ms - self._settings.margin_of(takt_ms)) / 1e3
        return time.monotonic() + left_s - 1.5 * self._judge_s

    # --- judging

    def _judge(self, batch: list[_Taken]) -> None:
        """Judge a batch, send its verdicts, keep its rows. One row per frame, whatever is wrong with some."""
        started = time.monotonic()
        try:
            outcomes = self._outcomes(batch)
        except StreamUnavailable:  # raised before anything was judged
            self._batcher.put_back(batch, time.monotonic())
            raise
        if len(outcomes) != len(batch):
            raise RuntimeError(f"{len(batch)} frames in, {len(outcomes)} outcomes out")
        if not self._rows:
            self._rows_since = time.monotonic()
        for outcome in outcomes:
            self._unsent.append(_verdict(self._keep(outcome), outcome.taken.entry.id))
        self.judged += len(batch)
        took_s = time.monotonic() - started
        self._judge_s = took_s if not self._judge_s else 0.8 * self._judge_s + 0.2 * took_s
        self._send()

    def _keep(self, outcome: _Outcome) -> Row:
        row = self._row(outcome)
        self._rows.append(row)
        entry, frame = outcome.taken.entry, outcome.taken.frame
        size = len(frame.picture.data)
        settlement = Settlement(
            frame.product, entry.id, frame.camera, frame.seq, row.verdict, size, frame.captured_at_ns
        )
        self._row_entries.append((entry, settlement))
        return row

    def _send(self) -> None:
        """Send verdicts. The line's takt waits for them, so they go before the rows are durable. A frame whose
        deadline has passed was answered by `unknown`: its row says the same, beside the score that came too late.
        """
        if not self._unsent:
            return
        late = self._stream.send_verdicts(self._unsent)
        self._unsent = []
        for index in [index for index, row in enumerate(self._rows) if row.frame_id in late] if late else ():
            row, (entry, settlement) = self._rows[index], self._row_entries[index]
            takt_ms = self._settings.takt_of(row.product)
            reason = f"late: no verdict within {takt_ms:g} ms" if takt_ms else "late"
            self._rows[index] = replace(row, verdict=UNKNOWN, reason=row.reason or reason)
            self._row_entries[index] = entry, replace(settlement, verdict=UNKNOWN)

    def _outcomes(self, batch: list[_Taken]) -> list[_Outcome]:
        residents = self._residents({taken.frame.product for taken in batch})
        requests: dict[int, Request] = {}
        reasons: dict[int, str] = {}
        for index, taken in enumerate(batch):
            resident = residents[taken.frame.product]
            if isinstance(resident, NoModel):
                reasons[index] = str(resident)
                continue
            try:
                image = taken.image.result().for_input(resident.card.input_size)
                requests[index] = Request(resident, image)
            except UnreadableImage as error:
                reasons[index] = str(error)
        judgements = self._engine_outcomes(requests, reasons)
        return [_Outcome(taken, judgements.get(i), reasons.get(i)) for i, taken in enumerate(batch)]

    def _residents(self, products: set[str]) -> dict[str, Resident | NoModel]:
        """The version of each product, looked up once a batch: a swap falls between two batches."""
        residents: dict[str, Resident | NoModel] = {}
        for product in products:
            try:
                residents[product] = self._residency.require(product)
            except NoModel as error:
                residents[product] = error
        return residents

    def _engine_outcomes(self, requests: dict[int, Request], reasons: dict[int, str]) -> dict[int, Judgement]:
        """Judgements by index; frames that the engine cannot judge get their reason instead."""
        if not requests:
            return {}
        try:
            judged = dict(zip(requests, self._engine.judge(list(requests.values())), strict=True))
        except DeviceFault:  # nothing can be judged here any more: another process takes these entries over
            raise
        except Exception:  # a model's failure must not take its neighbours down: try each frame alone
            logger.exception("a batch of %d frames failed, judging its frames one by one", len(requests))
            judged = {}
            for index, request in requests.items():
                try:
                    judged[index] = self._engine.judge([request])[0]
                except DeviceFault:
                    raise
                except Exception as error:
                    reasons[index] = f"the engine failed: {type(error).__name__}: {error}".splitlines()[0]
        for index in [index for index, judgement in judged.items() if not math.isfinite(judgement.score)]:
            reasons[index] = f"the score of version {judged[index].card.version} is not a finite number"
        return judged

    def _row(self, outcome: _Outcome) -> Row:
        taken, judgement, frame = outcome.taken, outcome.judgement, outcome.taken.frame
        card = judgement.card if judgement else None
        known = judgement is not None and outcome.reason is None
        score = judgement.score if judgement and known else None
        threshold = card.threshold if card else None
        verdict = UNKNOWN
        if score is not None and threshold is not None:
            verdict = FAIL if is_fail(score, threshold) else PASS
        map_u8 = low = high = jpeg = None
        if evidence.is_kept(frame, verdict, score or 0.0, threshold or 0.0, self._settings.evidence):
            if judgement and known:
                map_u8, low, high = evidence.quantised(judgement.anomaly_map)
            if taken.image.exception() is None:
                jpeg = evidence.image_jpeg(frame.picture, taken.image.result().image)
        return Row(
            frame_id=frame.frame_id,
            product=frame.product,
            camera=frame.camera,
            seq=frame.seq,
            captured_at=captured_at(frame.captured_at_ns),
            verdict=verdict,
            score=score,
            threshold=threshold,
            model_version=card.version if card else None,
            detector=card.detector.name if card else None,
            reason=outcome.reason,
            queue_ms=(taken.taken_at_ns - frame.captured_at_ns) / 1e6,
            infer_ms=judgement.infer_ms if judgement else 0.0,
            total_ms=(time.time_ns() - frame.captured_at_ns) / 1e6,
            replica=self._replica,
            map_u8=map_u8,
            map_min=low,
            map_max=high,
            image_jpeg=jpeg,
        )

    # --- recording

    def _commit_is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_commit:
            return False
        if self._durable or len(self._rows) >= self._settings.segment_rows:
            return True
        return bool(self._rows) and now - self._rows_since >= self._settings.segment_ms / 1e3

    def _commit(self) -> None:
        """Write the rows, then acknowledge their entries. In this order only: an entry acknowledged before its
        row is durable would be lost with this process.
        """
        if self._rows:
            try:
                self._results.write(self._rows)
            except ResultsUnavailable as error:
                trouble = f"{error}; nothing is acknowledged until it can be written"
                self._unwritten = _logged(trouble, self._unwritten)
                self._next_commit = time.monotonic() + _RETRY_S
                return
            self._durable += self._row_entries
            self._rows, self._row_entries = [], []
            self._unwritten = None
        if self._durable:
            self._stream.settle([settlement for _, settlement in self._durable])
            self._durable = []

    def _recover(self) -> None:
        # a third of the idle limit: an entry held here is refreshed at least twice before another may take it
        self._next_recovery = time.monotonic() + min(1.0, self._settings.claim_idle_ms / 3e3)
        room = max(0, self._room())
        entries = self._stream.recover(self._held(), room)
        if entries and len(entries) >= room:  # there may be more
            self._next_recovery = time.monotonic()
        self._take(entries)


def _logged(trouble: str, before: str | None) -> str:
    """Log `trouble` unless that was done already, and return it."""
    if trouble != before:
        logger.error("%s", trouble)
    return trouble


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
