"""The rows of `benchmarks.engine`: one network over sizes of batch and numbers of products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.document import Say, ratio
from benchmarks.networks import Network, Weights, make_engine, serving, trained
from benchmarks.pictures import PICTURES, textures
from benchmarks.roofline import Roofline, gflop_of
from benchmarks.timing import QUICK, Patience, in_threads, timed
from models.registry import Registry
from workers.engine import Budget, Engine, Request, Resident

_ZIPF_BATCHES = 16
_EACH = 64  # so that filling and draining the device weighs little


Image = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batches: sizes of batch, for one product.
        products: numbers of products, at the one size `batch`.
        batch: the size, and the number of products, of the figures at the document's top.
    """

    batches: tuple[int, ...]
    products: tuple[int, ...]
    batch: int


@dataclass(frozen=True)
class Bench:
    """Everything that a measurement needs beside its network.

    Attributes:
        folder: for registries.
        weights: of the teachers.
        device: of the engine.
        dtype: its precision.
        threads: of the engine on a CPU.
        sizes: what is measured.
        patience: how long.
        roofline: the device's limits.
    """

    folder: Path
    weights: Weights
    device: torch.device
    dtype: torch.dtype
    threads: int
    sizes: Sizes
    patience: Patience
    roofline: Roofline

    @property
    def callers(self) -> int:
        """How many batches are under way: two on a GPU, as the inspection loop has them, so that copies overlap."""
        return 2 if self.device.type == "cuda" else 1

    def full(self, call: Callable[[], object]) -> tuple[Callable[[], object], int]:
        """Return what keeps the device busy with calls that judge a batch each, and how many it makes."""
        if self.callers == 1:
            return call, 1
        return in_threads(call, self.callers, _EACH), self.callers * _EACH

    def budget(self, max_batch: int) -> Budget:
        """What an engine for batches of this size may use; a quick look does not wait for a compiler."""
        return Budget(max_batch=max_batch, threads=self.threads, compiled=self.patience is not QUICK)


def measure_network(bench: Bench, network: Network, whole: bool, say: Say) -> list[dict[str, Any]]:
    """Measure one network, over all sizes or at the one batch alone, with one product and mixed."""
    student = trained(network, bench.weights)
    registry = Registry(bench.folder / network.name / network.detector)
    sizes = bench.sizes
    counts = sorted({*sizes.products, sizes.batch}) if whole else [1, sizes.batch]
    batches = sorted({*sizes.batches, sizes.batch}) if whole else [sizes.batch]
    say(f"{network.name} ({network.detector}, {network.teacher}): {counts[-1]} products into service")
    engine = make_engine(registry, bench.weights, bench.budget(batches[-1]), bench.dtype)
    of_network = {
        "network": network.name,
        "teacher": network.teacher,
        "detector": network.detector,
        "input_size": network.size,
        "gflop_per_frame": round(gflop_of(student), 4),
    }
    pictures = textures(PICTURES, network.size)
    rows = []
    with serving(engine, registry, student, counts[-1]) as residents:
        for batch, count, mix in _cases(batches, counts, sizes.batch):
            say(f"{network.name}: batch {batch}, {count} products, {mix}")
            draw = zipf_batches if mix == "zipf" else even_batches
            row = of_network | {"bytes_per_product": residents[0].nbytes}
            row |= {"batch": batch, "products": count, "mix": mix}
            rows.append(row | _measure(engine, draw(residents[:count], batch, pictures), row, bench))
    return rows


def _cases(batches: Sequence[int], counts: Sequence[int], batch: int) -> Iterator[tuple[int, int, str]]:
    yield from ((each, 1, "even") for each in batches)
    for count in counts[1:]:
        yield from ((batch, count, mix) for mix in ("even", "zipf"))


def even_batches(residents: Sequence[Resident], batch: int, pictures: Sequence[Image]) -> Iterator[list[Request]]:
    """Yield batches for ever whose frames go round the products."""
    frame = 0
    while True:
        yield [
            Request(residents[number % len(residents)], pictures[number % len(pictures)])
            for number in range(frame, frame + batch)
        ]
        frame += batch


def zipf_batches(residents: Sequence[Resident], batch: int, pictures: Sequence[Image]) -> Iterator[list[Request]]:
    """Yield batches for ever whose frames are drawn: the k-th product has a share of 1/k; again after some batches."""
    shares = 1 / np.arange(1, len(residents) + 1)
    drawn = np.random.default_rng(0).choice(len(residents), (_ZIPF_BATCHES, batch), p=shares / shares.sum())
    while True:
        for row in drawn.tolist():
            yield [Request(residents[each], pictures[place % len(pictures)]) for place, each in enumerate(row)]


def _measure(engine: Engine, batches: Iterator[list[Request]], row: dict[str, Any], bench: Bench) -> dict[str, Any]:
    call, calls = bench.full(judging(engine, batches))
    timing = timed(call, bench.patience)
    rates = timing.rates(calls * row["batch"])
    tflops = rates["fps"] * row["gflop_per_frame"] / 1e3
    return rates | {
        "callers": bench.callers,
        "batches_per_timing": calls,
        "ms_per_batch": round(timing.median_s / calls * 1e3, 4),
        "tflops": round(tflops, 4),
        "of_peak": ratio(tflops, bench.roofline.tflops),
    }


def judging(engine: Engine, batches: Iterator[list[Request]]) -> Callable[[], object]:
    """Return a call that judges the next batch; they are made beforehand, as they are no part of the engine's work."""
    kept = itertools.cycle([next(batches) for _ in range(_ZIPF_BATCHES)])
    return lambda: engine.judge(next(kept))
