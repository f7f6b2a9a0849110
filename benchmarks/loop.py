"""The inspection loop from a real Valkey to durable rows, against its engine alone.

    python -m benchmarks.loop --json benchmarks/results/loop.json

Runs without Ray. Frames are generated textures of 256 x 256 as JPEG; the version is the configured default,
trained for one step, since accuracy does not matter to speed. Reported: what the engine does alone with decoded
frames in full batches (the limit), what the loop does end to end while two producers push as fast as it takes, and
the latency from capture to verdict at half of that rate.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch

from benchmarks.machine import describe_machine
from cluster.server import EmbeddedServer
from models.images import TrainingImage
from models.registry import Registry
from models.settings import TrainingSettings
from models.training import train
from models.versions import draft_card
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.sequence import Sequence
from producers.settings import PublisherSettings
from workers.engine import Engine, Request
from workers.loop import InspectionLoop
from workers.pointers import Pointers
from workers.reading import read_results
from workers.redis_stream import RedisStream
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.settings import WorkerSettings

_PRODUCT, _SIZE, _PICTURES = "bench", 256, 16


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2000, help="frames of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine; 1 is a replica's default")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer.start(Path(folder) / "redis") as valkey:
        document = _measure(Path(folder), valkey.url, options.frames)
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text, end="")


def _measure(folder: Path, url: str, frames: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (_SIZE // 8, _SIZE // 8, 3), np.uint8) for _ in range(_PICTURES)]
    images = [np.kron(image, np.ones((8, 8, 1), np.uint8)) for image in images]
    server = redis.Redis.from_url(url)
    settings = WorkerSettings()
    registry = Registry(folder / "registry")
    trained = train(images, TrainingSettings(steps=1))
    provenance = [TrainingImage(id=str(number), sha256="0" * 64) for number in range(_PICTURES)]
    card = registry.publish(draft_card(trained, _PRODUCT, provenance), trained.student)
    pointers = Pointers(server, registry)
    pointers.promote(_PRODUCT, card.version)
    engine = Engine(registry)
    residency = Residency(engine, pointers, settings.pointer_poll_s)
    residency.follow()
    engine_fps = _engine_alone(engine, images, settings.max_batch, frames)
    line = _Line(url, folder, engine, residency, settings)
    pictures = [Picture.encode(image) for image in images]
    loop_fps, _ = line.run(pictures, frames, None)
    _, latency_ms = line.run(pictures, frames // 2, loop_fps / 2)
    return {
        "benchmark": "loop",
        "machine": describe_machine(),
        "input": f"JPEG {_SIZE}x{_SIZE}, network input {card.input_size}, {card.detector.name}, {card.teacher.name}",
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch": settings.max_batch,
        "frames": frames,
        "engine_fps": round(engine_fps, 1),
        "loop_fps": round(loop_fps, 1),
        "loop_to_engine": round(loop_fps / engine_fps, 3),
        "latency_ms_at_half_load": {f"p{p}": round(float(np.percentile(latency_ms, p)), 1) for p in (50, 99)},
    }


def _engine_alone(engine: Engine, images: list[np.ndarray], batch: int, frames: int) -> float:
    resident = engine.resident(_PRODUCT)
    assert resident is not None
    requests = [Request(resident, images[number % len(images)]) for number in range(batch)]
    engine.judge(requests)
    started = time.perf_counter()
    for _ in range(max(1, frames // batch)):
        engine.judge(requests)
    return max(1, frames // batch) * batch / (time.perf_counter() - started)


class _Line:
    """Two producers and one loop."""

    def __init__(self, url: str, folder: Path, engine: Engine, residency: Residency, settings: WorkerSettings) -> None:
        self._url, self._results = url, str(folder / "results")
        self._engine, self._residency, self._settings = engine, residency, settings
        self._sequence = Sequence()

    def run(self, pictures: list[Picture], frames: int, fps: float | None) -> tuple[float, np.ndarray]:
        """Frames a second from the first publish to the last acknowledgement, and latencies in ms."""
        first = self._sequence.next()
        server = redis.Redis.from_url(self._url)
        stream = RedisStream(server, "bench", self._settings)
        writer = SegmentWriter(self._results, "bench")
        loop = InspectionLoop(stream, self._engine, self._residency, writer, self._settings, replica="bench")
        stop = threading.Event()
        worker = threading.Thread(target=loop.run, args=(stop,))
        started = time.perf_counter()
        worker.start()
        producers = [
            threading.Thread(target=self._produce, args=(f"cam-{n}", pictures, frames // 2, fps and fps / 2))
            for n in range(2)
        ]
        for thread in producers:
            thread.start()
        for thread in producers:
            thread.join()
        while server.zcard(f"waiting:{{{_PRODUCT}}}"):
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        stop.set()
        worker.join()
        rows = read_results(self._results, columns=("seq", "total_ms")).to_pydict()
        latency = np.array([ms for seq, ms in zip(rows["seq"], rows["total_ms"], strict=True) if seq > first])
        if len(latency) != frames // 2 * 2:
            raise RuntimeError(f"{frames} frames in, {len(latency)} rows out")
        return frames / seconds, latency

    def _produce(self, camera: str, pictures: list[Picture], frames: int, fps: float | None) -> None:
        publisher = Publisher(redis.Redis.from_url(self._url), PublisherSettings(max_in_flight=128))
        due = time.perf_counter()
        for number in range(frames):
            if fps:
                time.sleep(max(0.0, due - time.perf_counter()))
                due += 1 / fps
            picture = pictures[number % len(pictures)]
            publisher.publish(Frame(_PRODUCT, camera, self._sequence.next(), time.time_ns(), picture))


if __name__ == "__main__":
    main()
