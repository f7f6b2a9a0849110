"""The engine on this machine's device: frames a second over batches and products, against its limits and a plain way.

    python -m benchmarks.engine --json benchmarks/results/engine.json --plot docs/pictures/engine.png
    python -m benchmarks.engine --weights resnet18.safetensors --threads 2
    python -m benchmarks.engine --quick

Goes from uint8 images of the input's size to maps and scores on the CPU side. Needs neither Redis nor Ray nor a
network: without `--weights` the ResNet-18 teacher has random weights, which are as fast. The figures at the top are of
the ResNet-18 pair, taken in turn, round after round; the rows have every network. The plain way, `peer_fps`, is one
network for each product, teacher included, eager, in float32 and in the engine's precision, of which the faster counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import Say, at_least, say, write
from benchmarks.engine_headline import headline
from benchmarks.engine_rows import Bench, Sizes, measure_network
from benchmarks.machine import describe_machine
from benchmarks.networks import DEFAULT, NETWORKS, PAIR, Network, Weights
from benchmarks.roofline import measure_roofline
from benchmarks.timing import QUICK, THOROUGH
from models.errors import ModelError
from models.inference import best_dtype, pick_device

_ON_GPU = Sizes(batches=(1, 2, 4, 8, 16, 32, 64, 128), products=(1, 8, 32, 128), batch=32)
_ON_CPU = Sizes(batches=(1, 2, 4, 8, 16, 32), products=(1, 4, 8, 16), batch=8)
_QUICK = Sizes(batches=(1, 2), products=(1, 2), batch=2)


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="local ResNet-18 weights; else random ones")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads; 1 is a replica's default")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="whose rows are measured; else all")
    parser.add_argument("--quick", action="store_true", help="whether it works, in seconds; no figure to quote")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    options = parser.parse_args()
    try:
        document = measure(options.weights, options.threads, options.quick, say, options.networks)
    except ModelError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    write(document, options.json)
    if options.plot:
        from benchmarks.plots import plot_engine

        plot_engine(document, options.plot)


def measure(
    weights: Path | None, threads: int, quick: bool, say: Say, networks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure everything; return the document.

    Args:
        weights: local ResNet-18 weights.
        threads: of the engine and of what it is compared with, on a CPU.
        quick: small sizes and few calls.
        say: told each step.
        networks: whose rows are measured, by name; None takes all.

    Raises:
        TeacherError: the weights file is missing or of another network.
    """
    device = pick_device()
    sizes = _QUICK if quick else _ON_GPU if device.type == "cuda" else _ON_CPU
    with tempfile.TemporaryDirectory() as folder:
        files = Weights(weights, Path(folder))
        files.teacher(PAIR.teacher)  # a wrong file is said at once
        dtype = best_dtype(device)
        patience = QUICK if quick else THOROUGH
        say(f"{device}, {str(dtype).removeprefix('torch.')}: what the device can do at the most")
        roofline = measure_roofline(device, dtype, threads, patience)
        bench = Bench(Path(folder), files, device, dtype, threads, sizes, patience, roofline)
        names = networks or ((PAIR.name, DEFAULT.name) if quick else tuple(NETWORKS))
        chosen, notes = _available([NETWORKS[name] for name in names], files)
        rows = [row for each in chosen for row in measure_network(bench, each, each in (PAIR, DEFAULT), say)]
        figures = headline(bench, rounds=1 if quick else 5, swaps=2 if quick else 10, say=say)
    return figures | {
        "benchmark": "engine",
        "machine": describe_machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "quick": quick,
        "notes": notes,
        "peak": {name: round(value, 3) for name, value in dataclasses.asdict(roofline).items()},
        "rows": rows,
    }


def _available(networks: Sequence[Network], weights: Weights) -> tuple[list[Network], list[str]]:
    notes = ["the ResNet-18 teacher has random weights: no figure here depends on them"] if weights.random else []
    missing = {each.teacher: weights.missing(each.teacher) for each in networks}
    notes += [f"left out: {why}" for why in missing.values() if why]
    return [each for each in networks if not missing[each.teacher]], notes


if __name__ == "__main__":
    main()
