"""Frames through a line whose processes, disk and connections fail, and what became of every frame.

    python -m benchmarks.faults --frames 20000 --faults 30 --seed 1 --json benchmarks/results/faults.json

Real processes: four cameras with their spools, two replicas with small networks, a compactor and a server behind a
proxy. Faults come at random times, each kind as often as the others, drawn from the seed. At the end every frame that a
camera took must have exactly one row and one verdict, every malformed entry must be dead, and the ledger must balance.
`--seed` may be repeated, or a range as 1..5.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import KINDS, drawn, is_small
from benchmarks.faults.line import CAMERAS, PRODUCTS, Feed, Line, running_line, wait_until
from benchmarks.faults.verdicts import VerdictWatch
from benchmarks.machine import describe_machine
from cluster.server import ServerOptions
from producers import keys
from workers.ledger import read_ledger
from workers.reading import read_results

_DISK_MB = 64
_ENDING_S = 600.0


def main() -> int:
    """Run each seed; exit status 1 if a frame was lost or doubled or a ledger does not balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000, help="of all cameras together")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", default=["1"], nargs="+", help="numbers, or a range as 1..5")
    parser.add_argument("--rate", type=float, default=400.0, help="frames a second of all cameras together, at most")
    parser.add_argument("--fsync", choices=("always", "everysec"), default="everysec", help="of the server's file")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    runs = [_run(seed, options) for seed in _seeds(options.seed)]
    document = _total(runs) | {
        "command": "python -m benchmarks.faults " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "fsync": options.fsync,
        "runs": runs,
    }
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    else:
        print(text, end="")
    return 0 if all(run["as_promised"] for run in runs) else 1


def _seeds(given: list[str]) -> list[int]:
    seeds: list[int] = []
    for text in given:
        first, _, last = text.partition("..")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _total(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counts = ("captured", "judged", "shed", "dead", "in_flight", "lost", "doubled")
    return {name: sum(run[name] for run in runs) for name in counts} | {
        "balanced": all(run["balanced"] for run in runs)
    }


def _run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="proctor-faults-") as folder, _small_disk(Path(folder)) as results:
        started = time.monotonic()
        with running_line(
            Path(folder), results, Feed(options.frames, options.rate), ServerOptions(appendfsync=options.fsync)
        ) as line:
            with VerdictWatch(line.client).running() as watch:
                done = _harm(line, options, chance, started)
                _let_end(line)
            seconds = time.monotonic() - started
            ledger = read_ledger(line.client())
        truth = [
            f"{member.options['product']}/{member.options['camera']}/{seq}"
            for member in line.members
            if member.role == "producer"
            for seq in range(1, member.options["frames"] + 1)
        ]
        document = (
            _account(seed, ledger, truth, results, done) | _verdicts(watch, truth) | {"seconds": round(seconds, 1)}
        )
        document["as_promised"] = _as_promised(document)
        print(
            f"seed {seed}: " + json.dumps({k: v for k, v in document.items() if k != "faults"}),
            file=sys.stderr,
            flush=True,
        )
        return document


def _verdicts(watch: VerdictWatch, truth: list[str]) -> dict[str, int]:
    return {
        "without_verdict": sum(watch.counts[frame] == 0 for frame in truth),
        "second_verdicts": sum(max(0, watch.counts[frame] - 1) for frame in truth),
    }


def _as_promised(document: dict[str, Any]) -> bool:
    amiss = ("lost", "lost_in_ledger", "doubled", "in_flight", "shed", "without_verdict", "second_verdicts")
    return (
        document["balanced"]
        and not any(document[name] for name in amiss)
        and document["judged"] == document["frames"]
        and document["dead"] == document["malformed"]
    )


def _harm(line: Line, options: argparse.Namespace, chance: random.Random, started: float) -> list[dict[str, Any]]:
    """Do the faults, spread over the time that the frames need; return what was done when."""
    kinds = drawn(options.faults, chance)
    if not is_small(line.results):
        kinds = ["kill -9 replica" if kind == "disk full" else kind for kind in kinds]
    done = []
    for number, kind in enumerate(kinds):
        due = options.frames * (number + chance.random()) / len(kinds)
        wait_until(lambda due=due: _judged(line) >= 0.9 * due or not line.of("producer"), _ENDING_S, "frames")
        before = time.monotonic()
        what = KINDS[kind](line, chance)
        done.append({"at_s": round(before - started, 1), "kind": kind, "what": what})
        print(f"  {before - started:6.1f} s  {_judged(line):6d} judged  {kind}: {what}", file=sys.stderr, flush=True)
    return done


def _judged(line: Line) -> int:
    for member in line.members:
        member.keep_alive()
    with contextlib.closing(line.client()) as server:
        names = [f"{camera}:judged" for camera in CAMERAS]
        return sum(int(n or 0) for product in PRODUCTS for n in server.hmget(keys.ledger(product), names))


def _let_end(line: Line) -> None:
    """Wait until the cameras have no more frames and nothing is in flight."""

    def ended() -> bool:
        _judged(line)
        with contextlib.closing(line.client()) as server:
            left = sum(server.zcard(keys.waiting(product)) + server.xlen(keys.frames(product)) for product in PRODUCTS)
        return not line.of("producer") and left == 0

    wait_until(ended, _ENDING_S, "the last frames")


def _account(
    seed: int, ledger: list[Any], truth: list[str], results: Path, done: list[dict[str, Any]]
) -> dict[str, Any]:
    rows = Counter(read_results(str(results), columns=("frame_id",))["frame_id"].to_pylist())
    cameras = [camera for product in ledger for camera in product.cameras]
    counts = {
        name: sum(getattr(camera, name) for camera in cameras)
        for name in ("captured", "judged", "shed", "dead", "in_flight")
    }
    missing = [frame for frame in truth if frame not in rows]
    surplus = len(rows.keys() - set(truth))
    return {
        "seed": seed,
        **counts,
        "lost": len(missing),
        "lost_in_ledger": sum(camera.lost for camera in cameras),
        "doubled": sum(count - 1 for count in rows.values()) + surplus,
        "balanced": all(product.balanced for product in ledger),
        "frames": len(truth),
        "malformed": 10 * sum(each["kind"] == "malformed entries" for each in done),
        "faults": done,
        "missing": missing[:20],
    }


@contextlib.contextmanager
def _small_disk(home: Path) -> Iterator[Path]:
    """A file system of 64 MB where this user may make one, else a plain folder, which is not filled."""
    folder = home / "results"
    folder.mkdir()
    mounted = _call("mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(folder))
    if not mounted:
        print("no small file system can be mounted here: the disk is not filled", file=sys.stderr)
    try:
        yield folder
    finally:
        if mounted:
            _call("umount", "-l", str(folder))


def _call(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
