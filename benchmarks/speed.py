"""Frames a second of the recipes beside a memory bank of the same normal images, in one run.

    python -m benchmarks.speed --data ../shared/data --weights resnet18.safetensors --json benchmarks/results/speed.json

Both go from a uint8 image of their input size to map and score, on as many CPU threads (or on the GPU), by batches of
1, 8 and 16. A recipe is judged by the engine that serves it, after everything is compiled, and timed before and after
the bank; the slower figure counts. A training's steps do not change speed, so each recipe takes one; its memory holds
all scenes. The bank is PatchCore's as `benchmarks.memory_bank` has it: ResNet-18, 256 x 256, 10 % of the vectors, here
drawn at random, which does not change its speed; in bfloat16 where the CPU has it, without a compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.memory_bank import frames_per_s
from benchmarks.networks import Weights, make_engine, serving
from benchmarks.patchcore import PatchCore, Settings
from models.datasets import InspectionSet, find_sets
from models.images import read_training_images
from models.inference import best_dtype, pick_device
from models.registry import Registry
from models.settings import RECIPES, TrainingSettings
from models.training import train
from workers.engine import Budget, Engine, Request

_BATCHES = (1, 8, 16)


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a labelled set, or a folder of sets")
    parser.add_argument("--weights", type=Path, required=True, help="local ResNet-18 weights")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of either; 1 is a replica's default")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device()
    document = {
        "benchmark": "speed",
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(best_dtype(device)).removeprefix("torch."),
        "threads": options.threads,
        "sets": [_measure(each, options) for each in find_sets(options.data)],
    }
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")


def _measure(each: InspectionSet, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{each.name}: {len(each.train)} normal images", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights = Weights(options.weights, Path(folder))
        served = {name: _serve(name, each, options, weights, Path(folder) / name, stack) for name in options.recipes}
        before = {name: _fps(*recipe) for name, recipe in served.items()}
        settings = Settings(random=True)
        normals, _ = read_training_images(each.train, settings.size)
        bank = PatchCore(weights.teacher("resnet18"), normals, settings, 0)
        tested = _tested(each, settings.size)
        banks = {str(batch): frames_per_s(bank.judge, tested[:batch]) for batch in _BATCHES}
        after = {name: _fps(*recipe) for name, recipe in served.items()}
    recipes = {}
    for name in served:
        slower = {batch: min(before[name][batch], after[name][batch]) for batch in banks}
        ratios = {batch: round(slower[batch] / banks[batch], 1) for batch in banks}
        recipes[name] = {"frames_per_s": slower, "to_memory_bank": ratios}
    return {
        "name": each.name,
        "normal_images": len(each.train),
        "memory_bank": {"frames_per_s": banks, "vectors": len(bank.bank)},
        "recipes": recipes,
    }


def _serve(
    name: str,
    each: InspectionSet,
    options: argparse.Namespace,
    weights: Weights,
    folder: Path,
    stack: contextlib.ExitStack,
) -> tuple[Engine, list[Request]]:
    """Return an engine that serves a recipe with a memory of all normal images, and frames to time it with."""
    settings: TrainingSettings = RECIPES[name].model_copy(update={"steps": 1, "threads": options.threads})
    normals, _ = read_training_images(each.train, settings.input_size)
    tested = _tested(each, settings.input_size)
    registry = Registry(folder)
    student = train(normals, settings, teacher=weights.teacher(settings.teacher))
    print(f"{each.name}: compiling {name}", flush=True)
    engine = make_engine(registry, weights, Budget(_BATCHES[-1], options.threads))
    resident = stack.enter_context(serving(engine, registry, student, 1))[0]
    return engine, [Request(resident, image) for image in tested]


def _tested(each: InspectionSet, size: int) -> np.ndarray:
    """Return as many test images as the largest batch has, those of a small set more than once."""
    images = itertools.islice(itertools.cycle(each.test), _BATCHES[-1])
    return read_training_images([image.path for image in images], size)[0]


def _fps(engine: Engine, requests: list[Request]) -> dict[str, float]:
    def judge(indices: np.ndarray) -> None:
        engine.judge([requests[index] for index in indices])

    return {str(batch): frames_per_s(judge, np.arange(batch)) for batch in _BATCHES}


if __name__ == "__main__":
    main()
