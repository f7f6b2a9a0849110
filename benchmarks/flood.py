"""A flood at three times the line's capacity, for each policy of back-pressure.

    python -m benchmarks.flood --json benchmarks/results/flood.json --picture docs/pictures/flood.png

Real processes as in `benchmarks.faults`, without faults. First the capacity is measured with `block`; then four cameras
push at three times of it. Reported by policy: the largest memory of the server and the largest bytes in flight against
their bounds, how many frames were judged and shed, whether the ledger is exact, and the time from the flood's end until
nothing waits any more.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.line import PRODUCTS, Feed, Line, running_line, wait_until
from benchmarks.machine import describe_machine
from benchmarks.watching import Sample, Watch, plot
from producers import keys
from workers.ledger import read_ledger
from workers.reading import read_results

POLICIES = ("block", "drop_newest", "drop_oldest")
_BOUND = {"max_in_flight": 400, "max_in_flight_mb": 1.0, "retry_s": 60.0}


def main() -> None:
    """Measure and write document and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each flood")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    capacity, _, _ = _flood(1500, 1e5, "block")
    runs, pictures = [], []
    for policy in POLICIES:
        frames = int(3 * capacity * options.seconds)
        _, run, samples = _flood(frames, 3 * capacity, policy)
        runs.append(run)
        pictures.append((policy, samples))
        print(json.dumps(run), flush=True)
    document = {
        "benchmark": "flood",
        "command": "python -m benchmarks.flood",
        "machine": describe_machine(),
        "input": "JPEG 96x96, four cameras of two products, two replicas",
        "capacity_fps": round(capacity, 1),
        "flood_fps": round(3 * capacity, 1),
        "bounds_a_product": _BOUND,
        "runs": runs,
    }
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    else:
        print(text, end="")
    if options.picture:
        together = [
            {f"{name} {policy}" if name != "at_s" else name: value for name, value in each.items()}
            for policy, samples in pictures
            for each in samples
        ]
        rows = {
            label: [f"{name} {policy}" for policy in POLICIES]
            for label, name in (("in flight", "in_flight"), ("in flight, MB", "held_mb"), ("shed", "shed"))
        }
        plot(together, rows, "A flood at three times the capacity, by policy", options.picture)


def _flood(frames: int, rate: float, policy: str) -> tuple[float, dict[str, Any], list[Sample]]:
    """Frames a second while judging, the run's figures, its samples."""
    with tempfile.TemporaryDirectory(prefix="proctor-flood-") as folder:
        results = Path(folder) / "results"
        feed = Feed(frames, rate, _BOUND | {"policy": policy})
        with running_line(Path(folder), results, feed) as line, contextlib.closing(line.client()) as server:
            watch = Watch(server, lambda: _pids(line), PRODUCTS, results, every_s=0.2)
            with watch.running():
                wait_until(lambda: not line.of("producer"), 900, "the cameras")
                flooded = time.monotonic()
                wait_until(lambda: not any(server.zcard(keys.waiting(each)) for each in PRODUCTS), 900, "the rest")
                recovery_s = time.monotonic() - flooded
            ledger = read_ledger(server)
        rows = read_results(str(results), columns=("frame_id",)).num_rows
        return (
            _judged_a_second(watch.samples),
            _figures(policy, frames, ledger, rows, watch.samples, recovery_s),
            watch.samples,
        )


def _figures(
    policy: str, frames: int, ledger: list[Any], rows: int, samples: list[Sample], recovery_s: float
) -> dict[str, Any]:
    cameras = [camera for product in ledger for camera in product.cameras]
    counts = {name: sum(getattr(camera, name) for camera in cameras) for name in ("captured", "judged", "shed", "lost")}
    return {
        "policy": policy,
        "frames": frames,
        **counts,
        "rows": rows,
        "ledger_exact": all(each.balanced for each in ledger)
        and counts["captured"] == frames
        and rows == counts["judged"],
        "shed_by": dict(sum((Counter(camera.shed_by) for camera in cameras), Counter())),
        "largest_in_flight_mb": round(max(each["held_mb"] for each in samples), 2),
        "bound_in_flight_mb": _BOUND["max_in_flight_mb"] * len(PRODUCTS),
        "largest_in_flight": max(each["in_flight"] for each in samples),
        "bound_in_flight": _BOUND["max_in_flight"] * len(PRODUCTS),
        "server_mb_first_and_largest": [
            round(samples[0]["server_mb"], 1),
            round(max(each["server_mb"] for each in samples), 1),
        ],
        "recovery_s": round(recovery_s, 2),
    }


def _judged_a_second(samples: list[Sample]) -> float:
    """The rate between the first and the last tenth of the judged frames, so that no start is in it."""
    last = samples[-1]["judged"]
    within = [each for each in samples if 0.1 * last <= each["judged"] <= 0.9 * last]
    if len(within) < 2:
        return last / samples[-1]["at_s"]
    return (within[-1]["judged"] - within[0]["judged"]) / (within[-1]["at_s"] - within[0]["at_s"])


def _pids(line: Line) -> dict[str, int]:
    running = {
        member.name: member.process for member in line.members if member.process and member.process.poll() is None
    }
    return {name: process.pid for name, process in running.items()} | {"server": line.server.pid}


if __name__ == "__main__":
    main()
