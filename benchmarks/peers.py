"""Proctor's detectors beside anomalib's, on the same machine, images and teacher, in one run.

    python3 -m venv PEER && PEER/bin/pip install torch torchvision anomalib openvino
    python -m benchmarks.peers --peer-python PEER/bin/python --data DIR --weights FILE --json FILE

Accuracy of the peer comes from its maps and scores by Proctor's own measures. Speed of Proctor goes from a uint8 image
to map and score in the type its engine would choose; speed of the peer from a normalised float image to the same, in
float32, as it runs by default, and by OpenVINO where its environment has that. Proctor is timed before and after the
peer and the slower figure counts, since a machine's speed drifts. A detector's training does not change its speed: it
gets one step.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.memory_bank import accuracy
from models.datasets import InspectionSet, find_sets
from models.detectors import DETECTORS
from models.images import read_training_images
from models.inference import best_dtype, pick_device
from models.judging import speed
from models.settings import TrainingSettings
from models.teachers import load_teacher
from models.training import TrainedStudent, train

_PEER = Path(__file__).with_name("anomalib_peer.py")
_SIZE, _BATCHES = 256, (1, 8)


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter that has anomalib")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="one set each, in MVTec AD's layout")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of a ResNet-18 up to layer3")
    parser.add_argument("--detectors", nargs="+", choices=sorted(DETECTORS), default=sorted(DETECTORS))
    parser.add_argument("--methods", nargs="+", default=["stfpm", "patchcore"], help="the peer's")
    parser.add_argument("--steps", type=int, help="of the peer's STFPM; else its 100 epochs")
    parser.add_argument("--train-images", type=int, help="the peer's PatchCore learns from at most so many")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of either; 1 is a replica's default")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device()
    sets = {each.name: each for folder in options.data for each in find_sets(folder)}
    images, _ = read_training_images([image.path for image in next(iter(sets.values())).test[: _BATCHES[-1]]], _SIZE)
    students = {name: _student(name, images, options) for name in options.detectors}
    before = {name: _frames_per_s(student, images) for name, student in students.items()}
    peer = _run_peer(options, sets)
    after = {name: _frames_per_s(student, images) for name, student in students.items()}
    slower = {name: {size: min(before[name][size], after[name][size]) for size in before[name]} for name in before}
    document = {
        "benchmark": "peers",
        "machine": describe_machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "input": f"{_SIZE}x{_SIZE}, ResNet-18 teacher",
        "proctor": {
            "dtype": str(best_dtype(device)).removeprefix("torch."),
            "detectors": {
                name: {
                    "options": students[name].detector.model_dump(mode="json"),
                    "frames_per_s_before": before[name],
                    "frames_per_s_after": after[name],
                }
                for name in students
            },
        },
        "anomalib": peer,
        "proctor_to_anomalib": {
            name: {f"{result['method']} on {result['name']}": _ratios(fps, result) for result in peer["results"]}
            for name, fps in slower.items()
        },
    }
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text, end="")


def _student(name: str, images: np.ndarray, options: argparse.Namespace) -> TrainedStudent:
    """Return a detector with its default options, trained for a step beside the teacher that the peer has too."""
    settings = TrainingSettings(
        detector=name,
        detector_options={},
        teacher="resnet18",
        weights=str(options.weights),
        input_size=_SIZE,
        steps=1,
        batch_size=1,
        threads=options.threads,
    )
    return train(images, settings, teacher=load_teacher("resnet18", options.weights))


def _frames_per_s(student: TrainedStudent, images: np.ndarray) -> dict[str, float]:
    return {str(batch): round(speed(student, images, batch), 2) for batch in _BATCHES}


def _ratios(fps: dict[str, float], result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return Proctor's frames a second over the peer's, for each way the peer runs and each size of batch."""
    return {
        way: {size: round(fps[size] / theirs, 2) for size, theirs in result[way].items()}
        for way in ("frames_per_s", "frames_per_s_openvino")
        if way in result
    }


def _run_peer(options: argparse.Namespace, sets: dict[str, InspectionSet]) -> dict[str, Any]:
    """Run anomalib in its own environment and add to its results what its maps and scores are worth."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(options.peer_python), str(_PEER), "--weights", str(options.weights), "--out", out]
        command += ["--threads", str(options.threads), "--methods", *options.methods]
        command += ["--data", *(str(folder) for folder in options.data)]
        for budget in ("steps", "train_images"):
            if getattr(options, budget) is not None:
                command += [f"--{budget.replace('_', '-')}", str(getattr(options, budget))]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        document: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        for result in document["results"]:
            with np.load(Path(out) / f"{result['name']}-{result['method']}.npz") as judged:
                result.update(_accuracy(sets[result["name"]], dict(judged)))
    return document


def _accuracy(each: InspectionSet, judged: dict[str, np.ndarray]) -> dict[str, Any]:
    """Bring the peer's images into the set's order and measure."""
    rows = {name: row for row, name in enumerate(judged["images"].tolist())}
    order = [rows[f"test/{image.kind}/{image.path.name}"] for image in each.test]
    return accuracy(each, judged["maps"][order], judged["scores"][order])


if __name__ == "__main__":
    main()
