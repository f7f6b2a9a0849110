"""The figures at the top of `benchmarks.engine`: the ResNet-18 pair by the engine and by the plain way, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.document import Say, ratio
from benchmarks.engine_rows import Bench, even_batches, judging, zipf_batches
from benchmarks.hot_swap import hot_swap_ms
from benchmarks.networks import PAIR, make_engine, serving, trained
from benchmarks.own_networks import OwnNetworks
from benchmarks.pictures import PICTURES, textures
from benchmarks.timing import QUICK, ROUND, interleaved
from models.inference import torch_threads
from models.registry import Registry
from models.training import TrainedStudent
from workers.engine import Engine, Resident


def headline(bench: Bench, rounds: int, swaps: int, say: Say) -> dict[str, Any]:
    """Measure as many products as a batch has frames.

    Args:
        bench: where and how.
        rounds: in which each figure is taken once.
        swaps: of versions under load.
        say: told each step.
    """
    batch = bench.sizes.batch
    student, registry = trained(PAIR, bench.weights), Registry(bench.folder / "headline")
    say(f"{PAIR.name}: {batch} products into service, and a network of its own for each")
    engine = make_engine(registry, bench.weights, bench.budget(batch))
    pictures = list(itertools.islice(itertools.cycle(textures(PICTURES, PAIR.size)), batch))
    with serving(engine, registry, student, batch) as residents:
        there = [torch.from_numpy(picture).to(bench.device) for picture in pictures]
        calls = {name: bench.full(call) for name, call in _engine_calls(engine, residents, pictures, there).items()}
        for name, call in _plain_calls(bench, student, pictures).items():
            calls[name] = call, 1
            if bench.callers > 1:  # which suits eager networks better is no matter of principle: the faster counts
                calls[f"{name}, {bench.callers} callers"] = bench.full(call)
        calls["batch_1"] = judging(engine, even_batches(residents[:1], 1, there)), 1
        say(f"{PAIR.name}: engine and plain way in turn, {rounds} rounds")
        runs = {name: call for name, (call, _) in calls.items()}
        timings = interleaved(runs, QUICK if bench.patience is QUICK else ROUND, rounds)
        say(f"{PAIR.name}: {swaps} swaps of versions under load")
        swapped = hot_swap_ms(engine, registry, student, pictures, swaps)
    fps = {name: timing.rates(calls[name][1] * batch)["fps"] for name, timing in timings.items() if name != "batch_1"}
    return _figures(bench, fps) | {
        "batch_1_ms": round(timings["batch_1"].median_s * 1e3, 3),
        "hot_swap_ms": swapped,
        "plain_fps": {name: value for name, value in fps.items() if name.startswith("plain")},
    }


def _figures(bench: Bench, fps: dict[str, float]) -> dict[str, Any]:
    peer = max(value for name, value in fps.items() if name.startswith(("plain float32 mixed", "plain best mixed")))
    eager = max(value for name, value in fps.items() if name.startswith("plain float32 single"))
    return {
        "device": str(bench.device),
        "batch": bench.sizes.batch,
        "products": bench.sizes.batch,
        "callers": bench.callers,
        "single_fps": fps["single"],
        "device_fps": fps["device"],
        "mixed_fps": fps["mixed"],
        "peer_fps": peer,
        "mixed_to_single": ratio(fps["mixed"], fps["single"]),
        "mixed_to_peer": ratio(fps["mixed"], peer),
        "fp32_eager_fps": eager,
        "single_to_fp32_eager": ratio(fps["single"], eager),
        "zipf_fps": fps["zipf"],
    }


def _engine_calls(
    engine: Engine, residents: Sequence[Resident], pictures: Sequence[np.ndarray], there: Sequence[torch.Tensor]
) -> dict[str, Callable[[], object]]:
    batch = len(pictures)
    return {
        "device": judging(engine, even_batches(residents[:1], batch, there)),
        "single": judging(engine, even_batches(residents[:1], batch, pictures)),
        "mixed": judging(engine, even_batches(residents, batch, pictures)),
        "zipf": judging(engine, zipf_batches(residents, batch, pictures)),
    }


def _plain_calls(
    bench: Bench, student: TrainedStudent, pictures: Sequence[np.ndarray]
) -> dict[str, Callable[[], object]]:
    batch = bench.sizes.batch
    calls: dict[str, Callable[[], object]] = {}
    for name, dtype in (("float32", torch.float32), ("best", bench.dtype)):
        own = OwnNetworks(student, batch, bench.device, dtype)
        for mix, products in (("single", [0] * batch), ("mixed", list(range(batch)))):
            calls[f"plain {name} {mix}"] = _with_threads(own, pictures, products, bench.threads)
    return calls


def _with_threads(
    own: OwnNetworks, images: Sequence[np.ndarray], products: Sequence[int], threads: int
) -> Callable[[], object]:
    def judge() -> object:
        with torch_threads(threads):
            return own.judge(images, products)

    return judge if own.device.type == "cpu" else lambda: own.judge(images, products)
