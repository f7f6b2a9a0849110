"""How well a memory bank of the teacher's own features detects, and what it costs beside a student.

    python -m benchmarks.memory_bank --data DIR --teacher resnet18 --weights FILE --train-images 400 --json FILE

As PatchCore trains nothing, a seed decides only its random projection, the coreset's first vector and, with
`--train-images`, which images it sees.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.patchcore import PROJECTED, SHORTLIST, PatchCore, Settings
from models.datasets import InspectionSet, find_sets, read_mask
from models.images import read_training_images
from models.inference import best_dtype, pick_device
from models.metrics import aupro, image_auroc, pixel_auroc
from models.teachers import TEACHERS, Teacher, load_teacher

_BATCHES = (1, 8)
_LIMITS = (0.3, 0.05)
_WARM_UP, _TIMED, _TIMED_S = 2, 10, 3.0


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="sets in MVTec AD's layout")
    parser.add_argument("--teacher", choices=sorted(TEACHERS), default="resnet18")
    parser.add_argument("--weights", type=Path, help="the teacher's weights; else its own source")
    parser.add_argument("--size", type=int, default=256, help="side of the input, pixels")
    parser.add_argument("--train-images", type=int, help="of each set at most so many, drawn at random; else all")
    parser.add_argument("--coreset", type=float, default=0.1, help="share of the vectors that the bank keeps")
    parser.add_argument("--sigma", type=float, default=4.0, help="of the map's Gaussian, pixels; 0 leaves it out")
    parser.add_argument(
        "--reweight", action="store_true", help="score by the paper's equation 7, not the map's maximum"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is a replica's default")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device()
    teacher = load_teacher(options.teacher, options.weights)
    settings = Settings(options.size, options.coreset, options.sigma, options.reweight)
    document = {
        "benchmark": "memory_bank",
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(best_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "teacher": teacher.name,
        "teacher_sha256": teacher.weights_sha256,
        "settings": asdict(settings) | {"projected_dims": PROJECTED, "shortlist": SHORTLIST},
        "results": [
            _evaluate(each, teacher, settings, options.train_images, seed)
            for folder in options.data
            for each in find_sets(folder)
            for seed in range(options.seeds)
        ],
    }
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text, end="")


def _evaluate(
    each: InspectionSet, teacher: Teacher, settings: Settings, train_images: int | None, seed: int
) -> dict[str, Any]:
    paths = each.train
    if train_images is not None and train_images < len(paths):
        drawn = np.random.default_rng(seed).choice(len(paths), train_images, replace=False)
        paths = [paths[index] for index in sorted(drawn)]
    normals, _ = read_training_images(paths, settings.size)
    images, _ = read_training_images([image.path for image in each.test], settings.size)
    print(f"{each.name}, seed {seed}: {len(normals)} images to learn, {len(images)} to judge", file=sys.stderr)
    started = time.perf_counter()
    method = PatchCore(teacher, normals, settings, seed)
    fit_seconds = time.perf_counter() - started
    judged = [method.judge(images[at : at + _BATCHES[-1]]) for at in range(0, len(images), _BATCHES[-1])]
    maps, scores = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    return {
        "name": each.name,
        "seed": seed,
        "train_images": len(normals),
        **accuracy(each, maps, scores),
        "fit_seconds": round(fit_seconds, 1),
        "frames_per_s": {str(batch): frames_per_s(method.judge, images[:batch]) for batch in _BATCHES},
        "bank_vectors": len(method.bank),
        "bank_bytes": method.bank.numel() * method.bank.element_size(),
    }


def accuracy(each: InspectionSet, maps: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Return the figures of one method on one set.

    Args:
        each: The set whose test images were judged, in their order.
        maps: (N, S, S) float32 anomaly maps.
        scores: (N,) float32 scores.
    """
    defects = np.array([image.is_defect for image in each.test])
    figures: dict[str, Any] = {
        "test_good": int((~defects).sum()),
        "test_defects": int(defects.sum()),
        "image_auroc": image_auroc(scores, defects),
    }
    if each.has_masks:
        masks = [read_mask(image) for image in each.test]
        figures |= {"pixel_auroc": pixel_auroc(maps, masks)}
        figures |= {f"aupro_{100 * limit:g}": area for limit, area in (aupro(maps, masks, _LIMITS) or {}).items()}
    return figures


def frames_per_s(judge: Callable[[np.ndarray], object], batch: np.ndarray) -> float:
    """Return the frames judged a second, from the median of calls with one batch, after calls that warm up."""
    seconds: list[float] = []
    while len(seconds) < _WARM_UP + _TIMED or sum(seconds[_WARM_UP:]) < _TIMED_S:
        started = time.perf_counter()
        judge(batch)
        seconds.append(time.perf_counter() - started)
    return round(len(batch) / statistics.median(seconds[_WARM_UP:]), 2)


if __name__ == "__main__":
    main()
