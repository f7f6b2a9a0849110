"""Proctor's engine beside anomalib's STFPM in PyTorch and in OpenVINO, on the CPU, in turn within one run.

    python3 -m venv PEER && PEER/bin/pip install torch torchvision anomalib openvino
    python -m benchmarks.peer_speed --peer-python PEER/bin/python --weights resnet18.safetensors --json FILE

The same network on both sides: a ResNet-18 pair at 256 x 256 with the same teacher, in the precision that the engine
chooses by itself, and in float32 too. Proctor goes from uint8 images to maps and scores; anomalib from float images
that are normalised already, so a part of the work is left out for it. OpenVINO runs in every precision, for latency
(one stream) and for throughput (two streams, requests in flight). Each round measures every setting of either side
once; only one side computes at a time, after a pause.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.document import at_least, ratio, say, write
from benchmarks.engine_rows import even_batches, judging
from benchmarks.machine import describe_machine
from benchmarks.networks import DEFAULT, PAIR, Network, Weights, make_engine, serving, trained
from benchmarks.pictures import PICTURES, textures
from benchmarks.timing import Patience, timed
from models.inference import best_dtype
from models.registry import Registry
from workers.engine import Budget, Engine

Setting = dict[str, Any]
_Way = tuple[Setting, Callable[[Setting, float], dict[str, Any]]]
_PEER_BATCHES, _OUR_BATCHES = (1, 8), (8, 16)
_PRECISIONS, _MODES = ("f32", "bf16", "f16"), ("latency", "throughput")


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter that has anomalib and openvino")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of a ResNet-18 up to layer3")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads of either side")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one setting in one round")
    parser.add_argument("--pause", type=float, default=0.5, help="before each setting, seconds")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        peer = stack.enter_context(Peer(options.peer_python, options.weights, options.threads))
        ways: list[_Way] = [(each, peer.measure) for each in peer_settings()]
        ways += _our_ways(Path(folder), options, stack)
        rounds = [_round(ways, options, number) for number in range(options.rounds)]
        versions = peer.versions
    rows = [_row(setting, taken) for (setting, _), taken in zip(ways, zip(*rounds, strict=True), strict=True)]
    write(comparison(rows) | _circumstances(options, versions) | {"rows": rows}, options.json)


class Peer:
    """anomalib's process, which measures one setting a request.

    Attributes:
        versions: of its packages.
    """

    def __init__(self, python: Path, weights: Path, threads: int) -> None:
        command = [str(python), "-m", "benchmarks.anomalib_speed", "--weights", str(weights.absolute())]
        command += ["--threads", str(threads)]
        home = Path(__file__).resolve().parents[1]
        self._process = subprocess.Popen(
            command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.versions = self._answer()

    def measure(self, setting: Setting, seconds: float) -> dict[str, Any]:
        """Return frames a second and the precision that was computed in."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"setting": setting, "seconds": seconds}) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)


def peer_settings() -> list[Setting]:
    """Return every way that anomalib's network is run."""
    eager = [{"side": "anomalib", "runtime": "torch", "batch": batch} for batch in _PEER_BATCHES]
    return eager + [
        {"side": "anomalib", "runtime": "openvino", "precision": precision, "mode": mode, "batch": batch}
        for precision, mode, batch in itertools.product(_PRECISIONS, _MODES, _PEER_BATCHES)
    ]


def _our_ways(folder: Path, options: argparse.Namespace, stack: ExitStack) -> list[_Way]:
    weights, budget = Weights(options.weights, folder), Budget(max(_OUR_BATCHES), options.threads, compiled=True)
    asked: list[tuple[Network, torch.dtype | None]] = [(PAIR, None), (DEFAULT, None)]
    if best_dtype(torch.device("cpu")) != torch.float32:
        asked.append((PAIR, torch.float32))
    ways: list[_Way] = []
    for number, (network, dtype) in enumerate(asked):
        registry = Registry(folder / str(number))
        engine = make_engine(registry, weights, budget, dtype, "cpu")
        ways += _ways_of(network, weights, registry, engine, stack)
    return ways


def _ways_of(network: Network, weights: Weights, registry: Registry, engine: Engine, stack: ExitStack) -> list[_Way]:
    residents = stack.enter_context(serving(engine, registry, trained(network, weights), 1))
    pictures = textures(PICTURES, network.size)
    dtype = str(engine.dtype).removeprefix("torch.")

    def measuring(batch: int) -> Callable[[Setting, float], dict[str, Any]]:
        judge = judging(engine, even_batches(residents, batch, pictures))

        def measure(_: Setting, seconds: float) -> dict[str, Any]:
            taken = timed(judge, Patience(warm_up=1, calls=2, seconds=seconds)).seconds
            return {"fps": len(taken) * batch / sum(taken), "dtype": dtype}

        return measure

    return [
        ({"side": "proctor", "runtime": "engine", "network": network.name, "batch": batch}, measuring(batch))
        for batch in _OUR_BATCHES
    ]


def _round(ways: list[_Way], options: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    results = []
    for setting, measure in ways:
        time.sleep(options.pause)  # whoever computed last lets go of its cores
        results.append(measure(setting, options.seconds))
        named = " ".join(str(value) for value in setting.values())
        say(f"round {number + 1} of {options.rounds}: {named}: {results[-1]['fps']:.1f} frames/s")
    return results


def _row(setting: Setting, taken: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    rates = [round(each["fps"], 2) for each in taken]
    return setting | {"dtype": taken[0]["dtype"], "fps": round(statistics.median(rates), 2), "fps_of_rounds": rates}


def comparison(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best setting of each side, and Proctor's over the peer's."""

    def best(**wanted: Any) -> dict[str, Any]:
        return max((row for row in rows if wanted.items() <= row.items()), key=lambda row: float(row["fps"]))

    openvino, eager = best(runtime="openvino"), best(runtime="torch")
    own = best(network=DEFAULT.name)["dtype"]  # the engine's own choice on this machine
    same, default = best(network=PAIR.name, dtype=own), best(network=DEFAULT.name)
    openvino_f32, same_f32 = best(runtime="openvino", dtype="f32"), best(network=PAIR.name, dtype="float32")
    return {
        "best_openvino": openvino,
        "best_openvino_fps": openvino["fps"],
        "best_torch_fps": eager["fps"],
        "same_network_fps": same["fps"],
        "default_fps": default["fps"],
        "same_network_to_best_openvino": ratio(same["fps"], openvino["fps"]),
        "default_to_best_openvino": ratio(default["fps"], openvino["fps"]),
        "same_network_to_best_torch": ratio(same["fps"], eager["fps"]),
        "float32": {
            "openvino_fps": openvino_f32["fps"],
            "same_network_fps": same_f32["fps"],
            "same_network_to_openvino": ratio(same_f32["fps"], openvino_f32["fps"]),
        },
    }


def _circumstances(options: argparse.Namespace, versions: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "peer_speed",
        "machine": describe_machine(),
        "peer_versions": versions,
        "threads": options.threads,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "pause_s": options.pause,
        "default": f"{DEFAULT.detector}, {DEFAULT.teacher}, {DEFAULT.size} x {DEFAULT.size}",
    }


if __name__ == "__main__":
    main()
