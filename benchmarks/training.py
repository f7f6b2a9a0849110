"""How long training takes: each way on 200 images, and a step of AsymTS's student beside a plain one.

    python -m benchmarks.training --data ../shared/data/elpv_mono --json benchmarks/results/training.json

The limit measured in the same run is a training step of the plain ResNet student: a Contextual Transformer student
of the same width is given as a ratio of it. On a GPU, STFPM and FCL train at 256 x 256; on a CPU the default way is
what counts, and the others take `--steps` steps, from which their whole time is estimated and said to be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from models.datasets import find_sets
from models.detector import Detector
from models.detectors import make_detector
from models.fitting import training_dtype
from models.images import read_training_images
from models.inference import pick_device
from models.settings import RECIPES, TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import train

_IMAGES, _TIMED_STEPS, _WARM_UP = 200, 15, 2


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a labelled set with 200 normal images or more")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; else all cores")
    parser.add_argument("--steps", type=int, default=40, help="steps of the ways that are estimated on a CPU")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    threads = options.threads or torch.get_num_threads()
    device = pick_device()
    (each,) = find_sets(options.data)
    document = {
        "benchmark": "training",
        "machine": describe_machine(),
        "device": str(device),
        "threads": threads,
        "input": f"{_IMAGES} normal images of {each.name}",
        "ways": [_way(name, settings, each.train, threads, options.steps) for name, settings in _ways().items()],
        "student_step": _student_step(threads),
    }
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")


def _ways() -> dict[str, TrainingSettings]:
    network: dict[str, Any] = {"width": 1.0, "hardest": 0.1}
    full: dict[str, Any] = {
        "input_size": 256,
        "steps": 400,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "schedule": "onecycle",
    }
    fcl = {"host": "stfpm", "host_options": network}
    return {
        "default (fast)": RECIPES["fast"],
        "stfpm, 256, width 1": TrainingSettings(detector="stfpm", detector_options=network, **full),
        "fcl on stfpm, 256, width 1": TrainingSettings(detector="fcl", detector_options=fcl, **full),
        "accurate": RECIPES["accurate"].model_copy(update={"teacher": "efficientnet_lite0"}),
    }


def _way(name: str, settings: TrainingSettings, paths: list[Path], threads: int, steps: int) -> dict[str, Any]:
    images, _ = read_training_images(paths[:_IMAGES], settings.input_size)
    whole = pick_device().type == "cuda" or name.startswith("default")
    taken = settings.model_copy(update={"threads": threads} | ({} if whole else {"steps": steps}))
    seconds = train(images, taken).seconds
    if not whole:
        # Two lengths tell the steps' share from that of features and calibration.
        short = train(images, taken.model_copy(update={"steps": max(1, steps // 4)})).seconds
        per_step = (seconds - short) / (steps - max(1, steps // 4))
        seconds += per_step * (settings.steps - steps)
    return {
        "way": name,
        "detector": settings.detector,
        "teacher": settings.teacher,
        "input_size": settings.input_size,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seconds": round(seconds, 1),
        "estimated_from_steps": None if whole else steps,
    }


def _student_step(threads: int) -> dict[str, Any]:
    """Compare a training step of both kinds of block at the same width, batch 16, 128 x 128."""
    torch.set_num_threads(threads)
    teacher = load_teacher("efficientnet_lite0")
    ways = {"plain": {"blocks": "plain"}, "contextual": {}}
    steps = {name: _Step(make_detector("asymts", {"width": 0.5} | options), teacher) for name, options in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    # In turn, so that whatever else the machine does weighs on both alike.
    for _ in range(_WARM_UP + _TIMED_STEPS):
        for name, step in steps.items():
            times[name].append(step.seconds())
    seconds = {name: statistics.median(taken[_WARM_UP:]) for name, taken in times.items()}
    rates = {f"{name}_steps_per_s": round(1 / value, 2) for name, value in seconds.items()}
    return rates | {"contextual_to_plain": round(seconds["plain"] / seconds["contextual"], 3)}


class _Step:
    """A student's training step on random images, with the teacher's features at hand."""

    def __init__(self, detector: Detector, teacher: Teacher, batch: int = 16, size: int = 128) -> None:
        self._detector, self._device = detector, pick_device()
        self._dtype = training_dtype(self._device)
        student = detector.build_student(teacher).to(self._device)
        self._student = student.to(memory_format=torch.channels_last).train()
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        images = torch.from_numpy(np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32))
        self._images = images.to(self._device, memory_format=torch.channels_last)
        with torch.no_grad():
            self._features = teacher.to(self._device)(self._images)

    def seconds(self) -> float:
        """Take a step; return its duration."""
        started = time.perf_counter()
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            pairs = self._student(self._images, self._features)
        loss = self._detector.loss(pairs)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        loss.item()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
