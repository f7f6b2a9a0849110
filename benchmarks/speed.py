"""Frames a second of the recipes beside a memory bank of the same normal images, in one run.

    python -m benchmarks.speed --data ../shared/data --weights resnet18.safetensors --json benchmarks/results/speed.json

Both go from a uint8 image of their input size to map and score, on as many CPU threads (or on the GPU), by batches of
1 and 8. A recipe is timed before and after the bank, and the slower figure counts. A training's steps do not change
speed, so each recipe takes one; its memory holds all scenes. The bank is PatchCore's as `benchmarks.memory_bank` has
it: ResNet-18, 256 x 256, 10 % of the vectors, here drawn at random, which does not change its speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.memory_bank import frames_per_s
from benchmarks.patchcore import PatchCore, Settings
from models.datasets import InspectionSet, find_sets
from models.images import read_training_images
from models.inference import best_dtype, pick_device
from models.judging import speed
from models.settings import RECIPES, TrainingSettings
from models.teachers import load_teacher
from models.training import TrainedStudent, train

_BATCHES = (1, 8)


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
    students = {name: _student(RECIPES[name], each, options) for name in options.recipes}
    before = {name: _fps(*student) for name, student in students.items()}
    settings = Settings(random=True)
    normals, _ = read_training_images(each.train, settings.size)
    bank = PatchCore(load_teacher("resnet18", options.weights), normals, settings, 0)
    tested, _ = read_training_images([image.path for image in each.test[: _BATCHES[-1]]], settings.size)
    banks = {str(batch): frames_per_s(bank.judge, tested[:batch]) for batch in _BATCHES}
    after = {name: _fps(*student) for name, student in students.items()}
    recipes = {}
    for name in students:
        slower = {batch: min(before[name][batch], after[name][batch]) for batch in banks}
        ratios = {batch: round(slower[batch] / banks[batch], 1) for batch in banks}
        recipes[name] = {"frames_per_s": slower, "to_memory_bank": ratios}
    return {
        "name": each.name,
        "normal_images": len(each.train),
        "memory_bank": {"frames_per_s": banks, "vectors": len(bank.bank)},
        "recipes": recipes,
    }


def _student(
    settings: TrainingSettings, each: InspectionSet, options: argparse.Namespace
) -> tuple[TrainedStudent, np.ndarray]:
    """Return a student of all normal images and the test images to time it with."""
    weights = str(options.weights) if settings.teacher == "resnet18" else None
    quick = settings.model_copy(update={"weights": weights, "steps": 1, "threads": options.threads})
    normals, _ = read_training_images(each.train, settings.input_size)
    tested, _ = read_training_images([image.path for image in each.test[: _BATCHES[-1]]], settings.input_size)
    return train(normals, quick), tested


def _fps(student: TrainedStudent, tested: np.ndarray) -> dict[str, float]:
    return {str(batch): round(speed(student, tested, batch), 2) for batch in _BATCHES}


if __name__ == "__main__":
    main()
