"""The loop's stages, each alone and with the threads that it has in the loop; all give frames a second."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from benchmarks.cameras import Cameras, Order
from benchmarks.line import PRODUCT, Line
from producers.frame import Frame, Picture
from workers import evidence
from workers.decoding import Decoded, make_decoders
from workers.engine import Engine, Request
from workers.redis_stream import RedisStream
from workers.results import Row, SegmentWriter, captured_at
from workers.settings import EvidenceSettings
from workers.stream import Entry, Settlement, VerdictMessage

_BLOCK_MS = 50


def publishing(cameras: Cameras, frames: int) -> float:
    """Publish while nobody reads, without a bound that would make a camera wait."""
    return frames / cameras.publish(Order(PRODUCT, frames, max_in_flight=frames + 1))


def decoding(line: Line, pictures: Sequence[Picture], frames: int, size: int) -> float:
    """Decode pictures and fit them to the network's input, `size` pixels, two batches at a time."""
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


def engine_alone(engine: Engine, images: Sequence[np.ndarray], batch: int, frames: int) -> float:
    """Judge decoded frames of the input's size in full batches."""
    resident = engine.resident(PRODUCT)
    assert resident is not None
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


def recording(line: Line, stream: RedisStream, entries: Sequence[Entry], size: int) -> float:
    """Make rows of what was read, send their verdicts a batch at a time, make the rows durable and settle the entries.

    Args:
        line: whose settings are used.
        stream: that the entries were read from.
        entries: all pass.
        size: side of the anomaly map that the evidence is made of.
    """
    settings, writer = line.settings, SegmentWriter(line.results(), "bench")
    anomaly_map = np.random.default_rng(0).random((size, size), np.float32)
    started = time.perf_counter()
    for first in range(0, len(entries), settings.segment_rows):
        segment = entries[first : first + settings.segment_rows]
        rows = []
        for start in range(0, len(segment), settings.max_batch):
            batch = segment[start : start + settings.max_batch]
            judged = [_row(entry, anomaly_map, settings.evidence) for entry in batch]
            stream.send_verdicts([_verdict(row, entry.id) for row, entry in zip(judged, batch, strict=True)])
            rows += judged
        writer.write(rows)
        stream.settle([_settlement(row, entry) for row, entry in zip(rows, segment, strict=True)])
    return len(entries) / (time.perf_counter() - started)


def _row(entry: Entry, anomaly_map: np.ndarray, kept: EvidenceSettings) -> Row:
    frame = Frame.from_fields(entry.product, entry.fields)
    row = Row(
        frame_id=frame.frame_id,
        product=frame.product,
        camera=frame.camera,
        seq=frame.seq,
        captured_at=captured_at(frame.captured_at_ns),
        verdict=evidence.PASS,
        score=0.5,
        threshold=1e6,
        model_version="20260101T000000-0000",
        detector="bench",
        reason=None,
        queue_ms=1.0,
        infer_ms=1.0,
        total_ms=(time.time_ns() - frame.captured_at_ns) / 1e6,
        replica="bench",
    )
    if not evidence.is_kept(frame, row.verdict, 0.5, 1e6, kept):
        return row
    map_u8, low, high = evidence.quantised(anomaly_map)
    jpeg = evidence.image_jpeg(frame.picture, frame.picture.decode())
    return dataclasses.replace(row, map_u8=map_u8, map_min=low, map_max=high, image_jpeg=jpeg)


def _verdict(row: Row, entry_id: bytes) -> VerdictMessage:
    version = row.model_version or ""
    return VerdictMessage(row.product, row.camera, row.seq, row.verdict, 0.5, 1e6, version, "", row.total_ms, entry_id)


def _settlement(row: Row, entry: Entry) -> Settlement:
    at_ns = int(entry.fields[b"captured_at_ns"])
    return Settlement(row.product, entry.id, row.camera, row.seq, row.verdict, len(entry.fields[b"data"]), at_ns)
