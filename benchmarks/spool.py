"""The spool: how fast frames go onto the disk and from there into the stream, against publishing them directly.

    python -m benchmarks.spool --json benchmarks/results/spool.json

Frames are textures of 256 x 256 as JPEG; the server is a real Valkey of its own on this machine, one process pushes,
and nobody reads. Each round measures everything in turn; reported are the median of the rounds and their range.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.machine import describe_machine
from cluster.server import EmbeddedServer
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooled import Record
from producers.spooling import SpooledPublisher

_PRODUCT, _CAMERA, _SIZE, _PICTURES = "bench", "top", 256, 16
_SETTINGS = PublisherSettings(max_in_flight=10**9, max_in_flight_mb=1e6, memory_share=1.0)


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2000, help="frames of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where spool and server write; else the temporary folder")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        document = _measure(Path(folder), options.frames, options.rounds)
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text, end="")


def _measure(folder: Path, frames: int, rounds: int) -> dict[str, Any]:
    pictures = _pictures()
    mean_bytes = statistics.mean(len(picture.data) for picture in pictures)
    seconds: dict[str, list[float]] = {}
    with EmbeddedServer.start(folder / "redis") as valkey, redis.Redis.from_url(valkey.url) as server:
        line = _Line(folder / "spool", server, [_frame(seq, pictures) for seq in range(1, frames + 1)])
        for _ in range(rounds):
            for name, step in line.steps().items():
                server.flushall()
                seconds.setdefault(name, []).append(step())
    return {
        "machine": describe_machine(),
        "frames": frames,
        "rounds": rounds,
        "jpeg_bytes": round(mean_bytes),
        **{name: _rates(each, frames, mean_bytes) for name, each in seconds.items()},
    }


def _pictures() -> list[Picture]:
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (_SIZE // 8, _SIZE // 8, 3), np.uint8) for _ in range(_PICTURES)]
    return [Picture.encode(np.kron(image, np.ones((8, 8, 1), np.uint8))) for image in small]


def _frame(seq: int, pictures: list[Picture]) -> Frame:
    return Frame(_PRODUCT, _CAMERA, seq, time.time_ns(), pictures[seq % _PICTURES])


def _rates(seconds: list[float], frames: int, mean_bytes: float) -> dict[str, Any]:
    fps = sorted(frames / each for each in seconds)
    median = statistics.median(fps)
    return {
        "frames_per_s": round(median),
        "range": [round(fps[0]), round(fps[-1])],
        "mb_per_s": round(median * mean_bytes / 1e6, 1),
    }


class _Line:
    """The frames, and the ways that they go."""

    def __init__(self, folder: Path, server: redis.Redis, frames: list[Frame]) -> None:
        self._folder, self._server, self._frames = folder, server, frames

    def steps(self) -> dict[str, Callable[[], float]]:
        """What is measured, each in seconds; the replay takes what the append before it has left."""
        return {
            "publish": self._publish,
            "publish_with_idle_spool": self._publish_with_idle_spool,
            "append_fsync_always": lambda: self._append("always"),
            "replay_after_fsync_always": self._replay,
            "append_fsync_interval": lambda: self._append("interval"),
            "replay_after_fsync_interval": self._replay,
        }

    def _publish(self) -> float:
        publisher = Publisher(self._server, _SETTINGS)
        started = time.perf_counter()
        for frame in self._frames:
            publisher.publish(frame)
        return time.perf_counter() - started

    def _publish_with_idle_spool(self) -> float:
        with self._spooled_publisher(Spool(self._folder / "idle", 1 << 30)) as publisher:
            started = time.perf_counter()
            for frame in self._frames:
                publisher.publish(frame)
            return time.perf_counter() - started

    def _append(self, fsync: Any) -> float:
        spool = Spool(self._folder / fsync, 1 << 30, fsync)
        self._left = self._folder / fsync
        # a spool that was used keeps its position, so numbers go on
        base = spool.last_seq
        started = time.perf_counter()
        for frame in self._frames:
            spool.append(Record(base + frame.seq, base + 1, frame.captured_at_ns, frame.picture))
        took = time.perf_counter() - started
        spool.close()
        return took

    def _replay(self) -> float:
        spool = Spool(self._left, 1 << 30)
        started = time.perf_counter()
        with self._spooled_publisher(spool) as publisher:
            if not publisher.drain(threading.Event()) or publisher.counts().replayed != len(self._frames):
                raise RuntimeError(f"the replay is incomplete: {publisher.counts()}")
            return time.perf_counter() - started

    def _spooled_publisher(self, spool: Spool) -> SpooledPublisher:
        return SpooledPublisher(_PRODUCT, _CAMERA, self._server, spool, _SETTINGS)


if __name__ == "__main__":
    main()
