"""An hour of a line in a few minutes: does any process or store grow?

    python -m benchmarks.soak --json benchmarks/results/soak.json --picture docs/pictures/soak.png

Real processes as in `benchmarks.faults`, without faults: as many frames as a line of ten frames a second takes in an
hour are pushed as fast as the line goes. Reported: memory of every process and of the server after a third and at the
end, the least-squares slope over the second half, and how many segments ever waited for the compactor.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.line import PRODUCTS, Feed, Line, running_line, wait_until
from benchmarks.machine import describe_machine
from benchmarks.watching import Sample, Watch, plot, slope_per_hour
from producers import keys
from workers.ledger import read_ledger
from workers.reading import read_results


def main() -> None:
    """Run and write document and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=36_000)
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proctor-soak-") as folder:
        document, samples = _run(Path(folder), options.frames)
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")
    if options.picture:
        memory = sorted({name for each in samples for name in each if name.startswith("rss_mb")})
        rows = {
            "memory, MB": memory,
            "server's data, MB": ["server_mb"],
            "segments": ["segments"],
            "judged": ["judged"],
        }
        title = f"{options.frames:,} frames: {options.frames / 36_000:g} hours of a line of ten a second"
        plot(samples, rows, title, options.picture)


def _run(folder: Path, frames: int) -> tuple[dict[str, Any], list[Sample]]:
    results = folder / "results"
    with running_line(folder, results, Feed(frames, 1e4)) as line, contextlib.closing(line.client()) as server:
        watch = Watch(server, lambda: _pids(line), PRODUCTS, results, every_s=1.0)
        started = time.monotonic()
        with watch.running():
            wait_until(lambda: not line.of("producer"), 1800, "the cameras")
            wait_until(lambda: not any(server.xlen(keys.frames(each)) for each in PRODUCTS), 900, "the rest")
        seconds = time.monotonic() - started
        ledger = read_ledger(server)
    rows = read_results(str(results), columns=("frame_id",)).num_rows
    return _document(frames, rows, seconds, ledger, watch.samples), watch.samples


def _document(frames: int, rows: int, seconds: float, ledger: list[Any], samples: list[Sample]) -> dict[str, Any]:
    busy = [each for each in samples if 0 < each["judged"] < 0.98 * frames]
    names = sorted({name for each in busy for name in each if name.startswith("rss_mb")} | {"server_mb"})
    return {
        "benchmark": "soak",
        "command": "python -m benchmarks.soak",
        "machine": describe_machine(),
        "frames": frames,
        "rows": rows,
        "balanced": all(product.balanced for product in ledger),
        "seconds": round(seconds, 1),
        "memory": {
            name: {
                "after_a_third_mb": _at(busy, name, len(busy) // 3),
                "at_the_end_mb": _at(busy, name, len(busy) - 1),
                "slope_mb_a_minute": round(slope_per_hour(busy, name) / 60, 2),
            }
            for name in names
        },
        "most_segments": max(each["segments"] for each in samples),
    }


def _at(samples: list[Sample], name: str, index: int) -> float | None:
    """The figure at a sample, or at the nearest one before it that has it."""
    values = [each[name] for each in samples[: index + 1] if name in each]
    return round(values[-1], 1) if values else None


def _pids(line: Line) -> dict[str, int]:
    running = [member for member in line.members if member.process and member.process.poll() is None]
    return {member.name: member.process.pid for member in running if member.process} | {"server": line.server.pid}


if __name__ == "__main__":
    main()
