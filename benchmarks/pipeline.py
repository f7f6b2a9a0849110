"""The inspection loop from a real Valkey to durable rows, against each of its stages alone.

    python -m benchmarks.pipeline --json benchmarks/results/pipeline.json --plot docs/pictures/pipeline.png
    python -m benchmarks.pipeline --threads 2 --network pair
    python -m benchmarks.pipeline --quick

Runs without Ray, with the configured default recipe or another network, trained for one step and with random ResNet-18
weights, since accuracy does not matter to speed.
Two cameras in a process of their own publish JPEG of 256 x 256, JPEG of 1024 x 1024 and raw 256 x 256 as fast as they
may. Measured for each input: every stage alone, with the threads that it has in the loop; what the loop does end to
end, from the first publish to the last acknowledgement; and the latency from capture to verdict at half of that, after
4 s at this rate, beside two full batches of the engine plus 5 ms. All frames pass, so 2 % of the rows have map and
image.

Where there are few cores the stages take them from each other. So the processor time of each stage alone is measured
too, that of cameras, server and worker together; what the machine's cores allow is their number divided by the sum for
a frame, and the loop's bound is this or the slowest stage, whichever is less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.cameras import Cameras, Order
from benchmarks.document import Say, at_least, ratio, say, write
from benchmarks.line import PRODUCT, Line
from benchmarks.machine import describe_machine
from benchmarks.networks import DEFAULT, NETWORKS, Network, Weights, await_ready, make_engine, publish, trained
from benchmarks.pictures import INPUTS, PICTURES, Input, textures
from benchmarks.stages import decoding, engine_alone, publishing, reading, recording
from cluster.server import EmbeddedServer
from models.registry import Registry
from workers.engine import Budget, Engine
from workers.pointers import Pointers
from workers.residency import Residency
from workers.settings import WorkerSettings
from workers.stream import Entry

_ROUNDS = 3
_HELD_BYTES = 128 * 2**20
_IN_FLIGHT = 1024  # so that no camera waits for the rows that are written every 200 ms
_SLACK_MS = 5.0
_SETTLE_S = 4.0
_OF_THE_SERVER = ("user", "sys", "user_children", "sys_children")  # a child rewrites its file


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=at_least(16), default=2000, help="frames of each measurement")
    parser.add_argument("--network", choices=NETWORKS, default=DEFAULT.name, help="that judges")
    parser.add_argument(
        "--threads", type=at_least(1), default=1, help="CPU threads of the engine; 1 is a replica's default"
    )
    parser.add_argument(
        "--decode-threads", type=at_least(1), default=WorkerSettings().decode_threads, help="threads that decode"
    )
    parser.add_argument("--gpu-decode", action="store_true", help="the GPU decodes JPEGs, where there is one")
    parser.add_argument("--quick", action="store_true", help="whether it works, in seconds; no figure to quote")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    options = parser.parse_args()
    settings = WorkerSettings(gpu_decode=options.gpu_decode, decode_threads=options.decode_threads)
    document = measure(options.frames, options.threads, options.quick, say, settings, NETWORKS[options.network])
    write(document, options.json)
    if options.plot:
        from benchmarks.plots import plot_pipeline

        plot_pipeline(document, options.plot)


def measure(
    frames: int,
    threads: int,
    quick: bool,
    say: Say,
    settings: WorkerSettings | None = None,
    network: Network = DEFAULT,
) -> dict[str, Any]:
    """Measure every input; return the document, the first input's figures at its top.

    Args:
        frames: of each measurement.
        threads: of the engine, on a CPU.
        quick: few frames and one round.
        say: told each step.
        settings: of the worker; the default ones if None.
        network: that judges.
    """
    frames, rounds = (16, 1) if quick else (frames, _ROUNDS)
    settings = settings or WorkerSettings()
    with tempfile.TemporaryDirectory() as path, EmbeddedServer.start(Path(path) / "redis") as valkey:
        folder = Path(path)
        say(f"{network.detector}, {network.teacher}, {network.size}²: into service")
        budget = Budget(settings.max_batch, threads, compiled=not quick)
        engine, residency = _service(network, folder, valkey.url, budget)
        if settings.gpu_decode and engine.device.type != "cuda":
            say("there is no GPU, so the CPU decodes JPEGs")
        line = Line(valkey.url, folder, engine, residency, settings)
        rows = [_measure(line, each, frames, rounds, say) for each in INPUTS]
    top = (
        "slowest_stage",
        "slowest_fps",
        "loop_to_slowest",
        "loop_to_bound",
        "latency_ms_at_half_load",
        "latency_bound_ms",
    )
    return {
        "input": rows[0]["input"],
        "loop_fps": rows[0]["loop_fps"],
        **{name: rows[0][name] for name in top},
        "benchmark": "pipeline",
        "machine": describe_machine(),
        "network": f"{network.detector}, {network.teacher}, {network.size} x {network.size}",
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "threads": threads,
        "decode_threads": settings.decode_threads,
        "gpu_decode": settings.gpu_decode and engine.device.type == "cuda",
        "batch": settings.max_batch,
        "frames": frames,
        "rounds": rounds,
        "quick": quick,
        "rows": rows,
    }


def _service(network: Network, folder: Path, url: str, budget: Budget) -> tuple[Engine, Residency]:
    """Publish a version that passes everything, and take it into service as a replica does."""
    weights = Weights(None, folder)
    registry = Registry(folder / "registry")
    student = trained(network, weights)
    pointers = Pointers(redis.Redis.from_url(url), registry)
    pointers.promote(PRODUCT, publish(registry, student, PRODUCT, threshold=1e6))
    engine = make_engine(registry, weights, budget)
    residency = Residency(engine, pointers, WorkerSettings().pointer_poll_s)
    residency.follow()
    await_ready(engine)
    return engine, residency


def _measure(line: Line, given: Input, frames: int, rounds: int, say: Say) -> dict[str, Any]:
    with Cameras(line.url, given) as cameras:
        size = cameras.bytes_per_frame
        held = min(frames, _HELD_BYTES // size)  # all in the server at once
        in_flight = min(_IN_FLIGHT, _HELD_BYTES // size)
        say(f"{given.name}: the loop warms up")
        line.run(cameras, Order(PRODUCT, max(8, frames // 10)))
        alone: list[dict[str, tuple[float, float]]] = []
        loop: list[float] = []
        for number in range(rounds):
            say(f"{given.name}: round {number + 1} of {rounds}, each stage alone, then the loop")
            alone.append(_stages(line, cameras, given, frames, held))
            loop.append(line.run(cameras, Order(PRODUCT, frames, max_in_flight=in_flight))[0])
        loop_fps = float(np.median(loop))
        say(f"{given.name}: latency at {loop_fps / 2:.0f} frames/s")
        settle_s = 0.0 if rounds == 1 else _SETTLE_S
        latency_ms = _latencies(line, cameras, frames // 2, loop_fps / 2, in_flight, settle_s)
    fps, cpu_ms = (
        {name: round(float(np.median([stages[name][which] for stages in alone])), digits) for name in alone[0]}
        for which, digits in ((0, 1), (1, 3))
    )
    return {
        "input": given.name,
        "bytes_per_frame": size,
        "in_flight": in_flight,
        "loop_fps": round(loop_fps, 1),
    } | _figures(line, fps, cpu_ms, round(loop_fps, 1), latency_ms)


def _latencies(line: Line, cameras: Cameras, frames: int, fps: float, in_flight: int, settle_s: float) -> np.ndarray:
    """Latencies at a steady rate, once cameras and loop have started and the server has rewritten the file that full
    speed left behind.
    """
    settling = int(settle_s * fps)
    _, latency_ms = line.run(cameras, Order(PRODUCT, settling + frames, fps=fps, max_in_flight=in_flight))
    return latency_ms[settling:]


def _stages(line: Line, cameras: Cameras, given: Input, frames: int, held: int) -> dict[str, tuple[float, float]]:
    """Frames a second and processor milliseconds a frame of each stage alone; the `held` frames that are published are
    then read, recorded and settled.
    """
    stream, server = line.stream(), redis.Redis.from_url(line.url)
    stages: dict[str, tuple[float, float]] = {}

    def used_s() -> float:
        usage: Any = server.info("cpu")
        return time.process_time() + cameras.cpu_s + sum(usage[f"used_cpu_{each}"] for each in _OF_THE_SERVER)

    def alone(name: str, count: int, run: Callable[[], float]) -> None:
        before = used_s()
        fps = run()
        stages[name] = fps, (used_s() - before) / count * 1e3

    entries: list[Entry] = []

    def read() -> float:
        fps, found = reading(line, stream, held)
        entries.extend(found)
        return fps

    batch = line.settings.max_batch
    judged = textures(PICTURES, line.resident.card.input_size)
    alone("publish", held, lambda: publishing(cameras, held))
    alone("read", held, read)
    alone("record", held, lambda: recording(line, stream, entries))
    alone("decode", frames, lambda: decoding(line, given.pictures(), frames))
    alone("engine", (max(2, frames // batch) + 1) * batch, lambda: engine_alone(line, judged, frames))
    stream.close()
    return stages


def _figures(
    line: Line, fps: dict[str, float], cpu_ms: dict[str, float], loop_fps: float, latency_ms: np.ndarray
) -> dict[str, Any]:
    slowest = min(fps, key=lambda name: fps[name])
    batch_ms = line.settings.max_batch / fps["engine"] * 1e3
    cores_fps = round((os.cpu_count() or 1) / sum(cpu_ms.values()) * 1e3, 1)
    return {
        "stages_fps": fps,
        "slowest_stage": slowest,
        "slowest_fps": fps[slowest],
        "loop_to_slowest": ratio(loop_fps, fps[slowest]),
        "cpu_ms_per_frame": cpu_ms,
        "cores_fps": cores_fps,
        "loop_to_bound": ratio(loop_fps, min(cores_fps, fps[slowest])),
        "batch_ms": round(batch_ms, 2),
        "latency_ms_at_half_load": {f"p{p}": round(float(np.percentile(latency_ms, p)), 2) for p in (50, 99)},
        "latency_bound_ms": round(2 * batch_ms + _SLACK_MS, 2),
    }


if __name__ == "__main__":
    main()
