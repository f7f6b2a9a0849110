"""Frames through a real Valkey without a network: published, read, settled, beside a plain stream of the same bytes.

    python -m benchmarks.stream --json benchmarks/results/stream.json
    python -m benchmarks.stream --quick

Two cameras in a process of their own publish through the publisher, with its ledger and bounds; this process reads
batches of 8 and settles them, which acknowledges, deletes and counts. The limit is taken in the same run: the same
bytes by pipelines of 8 XADD, read by XREADGROUP and taken away by a pipeline of XACK and XDEL, without a ledger,
bounds or verdicts. One-way latency, from the capture to the read, is that at half of the speed reached.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.cameras import PLAIN_STREAM, Cameras, Order
from benchmarks.document import Say, at_least, ratio, say, write
from benchmarks.machine import describe_machine
from benchmarks.pictures import INPUTS, Input
from cluster.server import EmbeddedServer
from producers import keys
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings
from workers.stream import Entry, Settlement

_BATCH, _PRODUCT, _ROUNDS = 8, "bench", 3
_BLOCK_MS = 50


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=at_least(16), default=4000, help="frames of each measurement")
    parser.add_argument("--quick", action="store_true", help="whether it works, in seconds; no figure to quote")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    write(measure(options.frames, options.quick, say), options.json)


def measure(frames: int, quick: bool, say: Say) -> dict[str, Any]:
    """Measure every input; return the document, the first input's figures at its top."""
    frames, rounds = (80, 1) if quick else (frames, _ROUNDS)
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer.start(Path(folder)) as valkey:
        rows = [_measure(valkey.url, each, frames, rounds, say) for each in INPUTS]
        version: Any = redis.Redis.from_url(valkey.url).info("server")
    return {
        "input": rows[0]["input"],
        "fps": rows[0]["fps"],
        "mb_per_s": rows[0]["mb_per_s"],
        "latency_ms_at_half_load": rows[0]["latency_ms_at_half_load"],
        "plain_fps": rows[0]["plain_fps"],
        "to_plain": rows[0]["to_plain"],
        "benchmark": "stream",
        "machine": describe_machine(),
        "server": f"{version.get('server_name', 'redis')} {version.get('valkey_version', version['redis_version'])}",
        "batch": _BATCH,
        "frames": frames,
        "rounds": rounds,
        "quick": quick,
        "rows": rows,
    }


def _measure(url: str, given: Input, frames: int, rounds: int, say: Say) -> dict[str, Any]:
    say(f"{given.name}: {rounds} rounds of {frames} frames, by the publisher and plain in turn")
    ours, plain = [], []
    with Cameras(url, given) as cameras:
        _ours(url, cameras, Order(_PRODUCT, frames // 10))  # scripts are loaded, groups are made
        for _ in range(rounds):
            ours.append(frames / _ours(url, cameras, Order(_PRODUCT, frames))[0])
            plain.append(frames / _plain(url, cameras, frames))
        fps, plain_fps = float(np.median(ours)), float(np.median(plain))
        say(f"{given.name}: latency at {fps / 2:.0f} frames/s")
        _, latency_ms = _ours(url, cameras, Order(_PRODUCT, frames // 2, fps=fps / 2))
        size = cameras.bytes_per_frame
    return {
        "input": given.name,
        "bytes_per_frame": size,
        "fps": round(fps, 1),
        "fps_of_rounds": [round(each, 1) for each in ours],
        "mb_per_s": round(fps * size / 1e6, 1),
        "latency_ms_at_half_load": {f"p{p}": round(float(np.percentile(latency_ms, p)), 2) for p in (50, 99)},
        "plain_fps": round(plain_fps, 1),
        "to_plain": ratio(round(fps, 1), round(plain_fps, 1)),
    }


def _ours(url: str, cameras: Cameras, order: Order) -> tuple[float, np.ndarray]:
    """Return seconds from the first publish to the last acknowledgement, and each frame's way to here in ms."""
    stream = RedisStream(redis.Redis.from_url(url), "bench", WorkerSettings())
    stream.read(1, 0)  # the group is there
    latency_ms: list[float] = []
    started = time.perf_counter()
    cameras.begin(order)
    while len(latency_ms) < order.frames:
        entries = stream.read(_BATCH, _BLOCK_MS)
        now = time.time_ns()
        latency_ms += [(now - int(entry.fields[b"captured_at_ns"])) / 1e6 for entry in entries]
        if entries:
            stream.settle([_settlement(entry) for entry in entries])
        else:
            cameras.check()
    seconds = time.perf_counter() - started
    cameras.answer()
    stream.close()
    return seconds, np.array(latency_ms)


def _settlement(entry: Entry) -> Settlement:
    of = entry.fields
    camera, size, at_ns = of[b"camera"].decode(), len(of[b"data"]), int(of[b"captured_at_ns"])
    return Settlement(entry.product, entry.id, camera, int(of[b"seq"]), "pass", size, at_ns)


def _plain(url: str, cameras: Cameras, frames: int) -> float:
    """Return seconds from the first XADD to the last XDEL."""
    server, stream = redis.Redis.from_url(url), keys.frames(PLAIN_STREAM)
    server.delete(stream)
    server.xgroup_create(stream, keys.GROUP, id="0", mkstream=True)
    started = time.perf_counter()
    cameras.begin(Order(PLAIN_STREAM, frames, plain=_BATCH))
    taken = 0
    while taken < frames:
        reply: Any = server.xreadgroup(keys.GROUP, "bench", {stream: ">"}, count=_BATCH, block=_BLOCK_MS)
        ids = [each[0] for each in _entries(reply)]
        if ids:
            pipeline = server.pipeline(transaction=False)
            pipeline.xack(stream, keys.GROUP, *ids)
            pipeline.xdel(stream, *ids)
            pipeline.execute()
            taken += len(ids)
    seconds = time.perf_counter() - started
    cameras.answer()
    return seconds


def _entries(reply: Any) -> list[Any]:
    """Entries of the one stream, whichever protocol the client speaks."""
    if not reply:
        return []
    entries = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
    nested = entries and isinstance(entries[0], list) and isinstance(entries[0][0], tuple | list)
    return list(entries[0] if nested else entries)


if __name__ == "__main__":
    main()
