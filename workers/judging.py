"""From batches of frames to what became of each, in threads of their own, while the loop reads and records.

Two batches are under way at most: while the engine computes one, the next one's images are awaited and brought to it,
so the engine need not wait for what the loop does between two batches.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from models.calibration import is_fail
from producers.errors import UnreadableImage
from producers.frame import Frame
from workers import evidence
from workers.daemons import Daemons
from workers.decoding import Decoded
from workers.engine import Engine, Judgement, Request, Resident
from workers.errors import DeviceFault, NoModel
from workers.evidence import FAIL, PASS, UNKNOWN
from workers.settings import EvidenceSettings
from workers.stream import Entry

logger = logging.getLogger(__name__)

_UNDER_WAY = 2


@dataclass(frozen=True, slots=True)
class Taken:
    """An entry on its way: its frame and the image that a decoding thread makes of it."""

    entry: Entry
    frame: Frame
    image: Future[Decoded]
    taken_at_ns: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one taken frame.

    Attributes:
        taken: the frame.
        verdict: `pass`, `fail` or `unknown`.
        judgement: what the engine said; None if it was not asked or failed.
        reason: why there is no score; None if there is one.
        map: as `evidence.quantised` returns it, if it is kept.
        image_jpeg: the image, if it is kept.
    """

    taken: Taken
    verdict: str
    judgement: Judgement | None
    reason: str | None
    map: tuple[bytes, float, float] | None = None
    image_jpeg: bytes | None = None

    @property
    def score(self) -> float | None:
        """The frame's score; None if there is none that is worth anything."""
        return self.judgement.score if self.judgement and self.reason is None else None


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch under way; the result is its outcomes and when they were there, on the steady clock."""

    frames: Sequence[Taken]
    since: float
    result: Future[tuple[list[Outcome], float]]


class Judging:
    """Judges batches in the order in which they are given. Used by one thread.

    Args:
        engine: judges.
        kept: for which frames map and image are kept.
    """

    def __init__(self, engine: Engine, kept: EvidenceSettings) -> None:
        self._engine, self._kept = engine, kept
        self._threads = Daemons(_UNDER_WAY, "judge")
        self._batches: deque[_Batch] = deque()
        self._last_done = 0.0
        self._batch_s = 0.0

    def __len__(self) -> int:
        """How many frames are under way."""
        return sum(len(batch.frames) for batch in self._batches)

    @property
    def is_full(self) -> bool:
        """Whether no further batch may be given."""
        return len(self._batches) >= _UNDER_WAY

    @property
    def batch_s(self) -> float:
        """What a batch takes once the one before it is done, seconds, smoothed; 0 before the first."""
        return self._batch_s

    def members(self) -> list[Taken]:
        """The frames under way, oldest first."""
        return [taken for batch in self._batches for taken in batch.frames]

    def start(self, frames: Sequence[Taken], residents: Mapping[str, Resident | NoModel]) -> None:
        """Send a batch on its way.

        Args:
            frames: of the batch.
            residents: of the frames' products: the version that judges, or why there is none.
        """
        since = time.monotonic()
        self._batches.append(_Batch(frames, since, self._threads.submit(self._judge, frames, residents)))

    def await_next(self, timeout_s: float) -> bool:
        """Wait until the oldest batch is done; False if that takes longer or there is none."""
        if not self._batches:
            return False
        oldest = self._batches[0].result
        return oldest.done() or (timeout_s > 0 and bool(wait([oldest], timeout_s).done))

    def take(self) -> list[Outcome]:
        """Return the outcomes of the oldest batch, one for each frame in order, and let go of it; waits for it.

        Raises:
            DeviceFault: the device is broken and no further batch can be judged.
        """
        batch = self._batches.popleft()
        outcomes, done = batch.result.result()
        if len(outcomes) != len(batch.frames):
            raise RuntimeError(f"{len(batch.frames)} frames in, {len(outcomes)} outcomes out")
        took_s = max(0.0, done - max(batch.since, self._last_done))  # the one before it may have been done later
        self._last_done = max(done, self._last_done)
        self._batch_s = took_s if not self._batch_s else 0.8 * self._batch_s + 0.2 * took_s
        return outcomes

    def shutdown(self) -> None:
        """End the threads once everything under way is done."""
        self._threads.shutdown()

    # --- in a thread

    def _judge(
        self, frames: Sequence[Taken], residents: Mapping[str, Resident | NoModel]
    ) -> tuple[list[Outcome], float]:
        requests: dict[int, Request] = {}
        reasons: dict[int, str] = {}
        for index, taken in enumerate(frames):
            resident = residents[taken.frame.product]
            if isinstance(resident, NoModel):
                reasons[index] = str(resident)
                continue
            try:
                image = taken.image.result().for_input(resident.card.input_size)
                requests[index] = Request(resident, image)
            except UnreadableImage as error:
                reasons[index] = str(error)
        judged = self._judgements(requests, reasons)
        outcomes = [outcome_of(taken, judged.get(i), reasons.get(i), self._kept) for i, taken in enumerate(frames)]
        return outcomes, time.monotonic()

    def _judgements(self, requests: dict[int, Request], reasons: dict[int, str]) -> dict[int, Judgement]:
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


def outcome_of(taken: Taken, judgement: Judgement | None, reason: str | None, kept: EvidenceSettings) -> Outcome:
    """Say what became of a frame.

    Args:
        taken: the frame; its image is there.
        judgement: what the engine said, if it did.
        reason: why there is no score; None if there is one.
        kept: for which frames map and image are kept.
    """
    verdict, score, threshold = UNKNOWN, None, judgement.card.threshold if judgement else None
    if judgement and reason is None:
        score = judgement.score
        if threshold is not None:
            verdict = FAIL if is_fail(score, threshold) else PASS
    if not evidence.is_kept(taken.frame, verdict, score or 0.0, threshold or 0.0, kept):
        return Outcome(taken, verdict, judgement, reason)
    quantised = evidence.quantised(judgement.anomaly_map) if judgement and reason is None else None
    readable = taken.image.exception() is None
    jpeg = evidence.image_jpeg(taken.frame.picture, taken.image.result().image) if readable else None
    return Outcome(taken, verdict, judgement, reason, quantised, jpeg)
