"""What the guarantees cost: the inspection loop as it is against the same loop without them, in one run.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json

Without guarantees means: frames by a plain XADD, verdicts by a plain XADD, entries acknowledged and deleted by a plain
pipeline, no ledger, no waiting sets, no tallies, no claims, no retention, rows written without fsync. Both go through a
real Valkey, the same decoder and the same engine, and are measured in turn. A second pair of figures leaves the network
out (every frame gets the same judgement), to show the streams' own rate, which is what the guarantees slow down.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
import torch

from benchmarks.machine import describe_machine
from cluster.server import EmbeddedServer
from models.images import TrainingImage
from models.registry import Registry
from models.settings import TrainingSettings
from models.training import train
from models.versions import draft_card
from producers import keys
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.engine import Engine, Judgement, Request
from workers.loop import InspectionLoop
from workers.places import Places
from workers.pointers import Pointers
from workers.redis_stream import RedisStream
from workers.residency import Residency
from workers.results import SCHEMA, Row, SegmentWriter
from workers.settings import WorkerSettings
from workers.stream import Entry, Settlement, VerdictMessage

_PRODUCT, _SIZE, _PICTURES, _WINDOW = "bench", 256, 16, 128


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1500, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way, in turn")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer.start(Path(folder) / "redis") as valkey:
        bench = _Bench(Path(folder), valkey.url)
        document = {
            "benchmark": "overhead",
            "command": "python -m benchmarks.overhead",
            "machine": describe_machine(),
            "input": f"JPEG {_SIZE}x{_SIZE}, one producer, one loop, one engine thread",
            "frames": options.frames,
            "rounds": options.rounds,
            "with_the_engine": _compared(bench, bench.engine, options),
            "streams_alone": _compared(bench, _Instant(bench.engine), options),
        }
    document["overhead"] = document["with_the_engine"]["overhead"]
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")


def _compared(bench: "_Bench", engine: Any, options: argparse.Namespace) -> dict[str, Any]:
    guaranteed, bare = [], []
    for _ in range(options.rounds):
        guaranteed.append(bench.guaranteed(engine, options.frames))
        bare.append(bench.bare(engine, options.frames))
    with_fps, without_fps = statistics.median(guaranteed), statistics.median(bare)
    return {
        "fps": round(with_fps, 1),
        "fps_without_guarantees": round(without_fps, 1),
        "overhead": round(1 - with_fps / without_fps, 4),
        "all_fps": [round(each, 1) for each in guaranteed],
        "all_fps_without_guarantees": [round(each, 1) for each in bare],
    }


class _Instant:
    """An engine that gives every frame one judgement at once."""

    def __init__(self, engine: Engine) -> None:
        self.device, self.resident = engine.device, engine.resident
        resident = engine.resident(_PRODUCT)
        assert resident is not None
        (self._judgement,) = engine.judge([Request(resident, np.zeros((_SIZE, _SIZE, 3), np.uint8))])

    def judge(self, requests: Sequence[Request]) -> list[Judgement]:
        """The same for all."""
        return [self._judgement] * len(requests)


class _Bench:
    """A server, a version in service and pictures."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._places = folder, Places(url, "", "", "")
        self._numbers = itertools.count(1)
        generator = np.random.default_rng(0)
        blocks = generator.integers(0, 256, (_PICTURES, _SIZE // 8, _SIZE // 8, 3), np.uint8)
        images = [np.kron(block, np.ones((8, 8, 1), np.uint8)) for block in blocks]
        self._pictures = [Picture.encode(image) for image in images]
        trained = train(images, TrainingSettings(steps=1))
        registry = Registry(folder / "registry")
        provenance = [TrainingImage(id=str(number), sha256="0" * 64) for number in range(_PICTURES)]
        card = registry.publish(draft_card(trained, _PRODUCT, provenance), trained.student)
        pointers = Pointers(self._places.connect(), registry)
        pointers.promote(_PRODUCT, card.version)
        self.engine = Engine(registry)
        self._residency = Residency(self.engine, pointers, 3600.0)
        self._residency.follow()

    def guaranteed(self, engine: Any, frames: int) -> float:
        """Frames a second as the product does it."""
        server = self._places.connect()
        publisher = Publisher(server, PublisherSettings(max_in_flight=_WINDOW))
        stream = RedisStream(self._places.connect(), "bench", WorkerSettings())
        writer = SegmentWriter(str(self._folder / "guaranteed"), "bench")
        return self._measure(engine, frames, publisher.publish, (stream, writer), server)

    def bare(self, engine: Any, frames: int) -> float:
        """Frames a second without any guarantee."""
        server = self._places.connect()
        stream = _BareStream(self._places.connect())
        writer = _BareWriter(str(self._folder / "bare"), "bench")

        def publish(frame: Frame) -> None:
            while server.xlen("bare") >= _WINDOW:
                time.sleep(0.002)
            fields: Any = frame.to_fields()
            server.xadd("bare", fields)

        return self._measure(engine, frames, publish, (stream, writer), server)

    def _measure(self, engine: Any, frames: int, publish: Any, ends: tuple[Any, Any], server: redis.Redis) -> float:
        stream, writer = ends
        loop = InspectionLoop(stream, engine, self._residency, writer, WorkerSettings(), replica="bench")
        stop = threading.Event()
        running = threading.Thread(target=loop.run, args=(stop,))
        started = time.perf_counter()
        running.start()
        for _ in range(frames):
            seq = next(self._numbers)
            publish(Frame(_PRODUCT, "cam", seq, time.time_ns(), self._pictures[seq % _PICTURES]))
        while server.xlen("bare") or server.xlen(keys.frames(_PRODUCT)):
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        stop.set()
        running.join()
        return frames / seconds


class _BareStream:
    """A consumer group's member without ledger, claims and scripts."""

    def __init__(self, server: redis.Redis) -> None:
        self._server = server
        with contextlib.suppress(redis.ResponseError):
            server.xgroup_create("bare", keys.GROUP, id="0", mkstream=True)

    def read(self, count: int, block_ms: int) -> list[Entry]:
        """New entries."""
        reply: Any = self._server.xreadgroup(keys.GROUP, "bench", {"bare": ">"}, count=count, block=block_ms or None)
        return [Entry(_PRODUCT, entry_id, fields) for _, entries in reply or () for entry_id, fields in entries]

    def recover(self, held: Sequence[Entry], count: int) -> list[Entry]:
        """Nothing is ever recovered."""
        return []

    def send_verdicts(self, verdicts: Sequence[VerdictMessage]) -> set[str]:
        """Publish verdicts."""
        pipeline = self._server.pipeline(transaction=False)
        for verdict in verdicts:
            fields: Any = {name: str(value) for name, value in asdict(verdict).items()}
            pipeline.xadd("bare-verdicts", fields, maxlen=keys.VERDICTS_KEPT, approximate=True)
        pipeline.execute()
        return set()

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Acknowledge and delete."""
        pipeline = self._server.pipeline(transaction=False)
        ids = [item.id for item in settlements]
        pipeline.xack("bare", keys.GROUP, *ids)
        pipeline.xdel("bare", *ids)
        pipeline.execute()

    def dead_letter(self, entry: Entry, camera: str, reason: str) -> None:
        """Nothing here is malformed."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to leave."""


class _BareWriter(SegmentWriter):
    """Writes segments without fsync."""

    def write(self, rows: Sequence[Row]) -> str:
        """See SegmentWriter, without its promise."""
        table = pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)
        path = f"{self._folder}/{time.time_ns():020d}.arrow"
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
        return path


if __name__ == "__main__":
    main()
