"""The loop's stages, each alone and with the threads that it has in the loop; all give frames a second."""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from benchmarks.cameras import Cameras, Order
from benchmarks.line import PRODUCT, Line
from producers.frame import Frame, Picture
from workers.decoding import Decoded, make_decoders
from workers.engine import Judgement, Request
from workers.judging import Taken, outcome_of
from workers.recording import Recording
from workers.redis_stream import RedisStream
from workers.results import SegmentWriter
from workers.stream import Entry

_BLOCK_MS = 50


def publishing(cameras: Cameras, frames: int) -> float:
    """Publish while nobody reads, without a bound that would make a camera wait."""
    return frames / cameras.publish(Order(PRODUCT, frames, max_in_flight=frames + 1))


def decoding(line: Line, pictures: Sequence[Picture], frames: int) -> float:
    """Decode pictures and fit them to the network's input, two batches at a time."""
    size = line.resident.card.input_size
    decoders = make_decoders(line.settings, line.engine.device)
    waiting: deque[Future[Decoded]] = deque()
    started = time.perf_counter()
    for picture in itertools.islice(itertools.cycle(pictures), frames):
        waiting.append(decoders.submit(picture, size))
        if len(waiting) == 2 * line.settings.max_batch:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()
    seconds = time.perf_counter() - started
    decoders.shutdown()
    return frames / seconds


def engine_alone(line: Line, images: Sequence[np.ndarray], frames: int) -> float:
    """Judge decoded frames of the input's size in full batches."""
    engine, resident, batch = line.engine, line.resident, line.settings.max_batch
    requests = [Request(resident, images[number % len(images)]) for number in range(batch)]
    engine.judge(requests)
    batches = max(2, frames // batch)
    started = time.perf_counter()
    for _ in range(batches):
        engine.judge(requests)
    return batches * batch / (time.perf_counter() - started)


def reading(line: Line, stream: RedisStream, frames: int) -> tuple[float, list[Entry]]:
    """Read what was published, a batch at a time; return the entries too."""
    entries: list[Entry] = []
    started = time.perf_counter()
    while len(entries) < frames:
        entries += stream.read(line.settings.max_batch, _BLOCK_MS)
    return frames / (time.perf_counter() - started), entries


def recording(line: Line, stream: RedisStream, entries: Sequence[Entry]) -> float:
    """Say what became of entries that all pass, send their verdicts a batch at a time, make their rows durable and
    settle them.

    Args:
        line: whose settings are used.
        stream: that the entries were read from.
        entries: of `PRODUCT`.
    """
    settings, card = line.settings, line.resident.card
    anomaly_map = np.random.default_rng(0).random((card.input_size, card.input_size), np.float32)
    judgement = Judgement(anomaly_map, 0.5, card, infer_ms=1.0)
    decoded = _decoded(entries[0])
    record = Recording(SegmentWriter(line.results(), "bench"), settings, "bench")

    def settle() -> None:
        if durable := record.durable():
            stream.settle(durable)
            record.acknowledged()

    started = time.perf_counter()
    for first in range(0, len(entries), settings.max_batch):
        batch = [_taken(entry, decoded) for entry in entries[first : first + settings.max_batch]]
        outcomes = [outcome_of(taken, judgement, None, settings.evidence) for taken in batch]
        stream.send_verdicts([record.add(outcome) for outcome in outcomes])
        record.advance()
        settle()
    record.finish()
    settle()
    seconds = time.perf_counter() - started
    record.shutdown()
    return len(entries) / seconds


def _taken(entry: Entry, decoded: Future[Decoded]) -> Taken:
    return Taken(entry, Frame.from_fields(entry.product, entry.fields), decoded, time.time_ns())


def _decoded(entry: Entry) -> Future[Decoded]:
    """Return one image for all: decoding is a stage of its own."""
    decoded: Future[Decoded] = Future()
    decoded.set_result(Decoded(Frame.from_fields(entry.product, entry.fields).picture.decode()))
    return decoded
