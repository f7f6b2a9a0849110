"""Whether half precision judges as float32 does, over labelled sets.

    python -m benchmarks.precision --data ../shared/data --weights resnet18.safetensors --recipe fast --json FILE

Each set is trained once, from the seed, and its version published; then two engines judge every test image, one in
float32 and one in the fastest type of the device. A verdict is by the version's own threshold, which the training
calibrates in the fastest type, as a plant's is. A frame is away from the threshold when neither of its two scores is
within 2 % of it.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.document import at_least, say, write
from benchmarks.machine import describe_machine
from benchmarks.networks import Weights, await_ready, make_engine, publish
from models.calibration import is_fail
from models.cards import ModelCard
from models.datasets import InspectionSet, find_sets
from models.errors import ModelError
from models.images import read_training_images
from models.inference import best_dtype, pick_device
from models.metrics import image_auroc
from models.registry import Registry
from models.settings import RECIPES, TrainingSettings, recipe
from models.training import train
from workers.engine import Budget, Request

_BATCH, _NEAR, _QUICK_STEPS = 16, 0.02, 2
_AUROC_POINTS, _FLIP_SHARE = 0.1, 0.001  # what is accepted


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a labelled set, or a folder of sets")
    parser.add_argument("--weights", type=Path, help="local ResNet-18 weights, for recipes with that teacher")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="fast")
    parser.add_argument("--steps", type=at_least(1), help="of training, else the recipe's")
    parser.add_argument("--quick", action="store_true", help="whether it works, in seconds; no figure to quote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads; 1 is a replica's default")
    parser.add_argument("--json", type=Path, help="where the document goes, beside standard output")
    options = parser.parse_args()
    device = pick_device()
    try:
        sets = [_measure(each, options, best_dtype(device)) for each in find_sets(options.data)]
    except ModelError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    document = _overall(sets) | {
        "benchmark": "precision",
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(best_dtype(device)).removeprefix("torch."),
        "recipe": options.recipe,
        "steps": _settings(options).steps,
        "seed": options.seed,
        "accepted": {"auroc_points": _AUROC_POINTS, "flips_away_share": _FLIP_SHARE},
        "sets": sets,
    }
    write(document, options.json)


def _settings(options: argparse.Namespace) -> TrainingSettings:
    settings = recipe(options.recipe)
    changes = {
        "seed": options.seed,
        "threads": options.threads,
        "steps": _QUICK_STEPS if options.quick else options.steps or settings.steps,
    }
    if settings.teacher == "resnet18":
        changes["weights"] = str(options.weights) if options.weights else None
    return settings.model_copy(update=changes)


def _measure(each: InspectionSet, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    settings = _settings(options)
    normals, _ = read_training_images(each.train, settings.input_size)
    tested, _ = read_training_images([image.path for image in each.test], settings.input_size)
    say(f"{each.name}: {settings.steps} steps on {len(normals)} images, then {len(tested)} are judged twice")
    with tempfile.TemporaryDirectory() as folder:
        registry, weights = Registry(folder), Weights(options.weights, Path(folder))
        version = publish(registry, train(normals, settings), "bench")
        card = registry.card("bench", version)
        budget = Budget(max_batch=_BATCH, threads=options.threads, compiled=not options.quick)
        exact, fast = (_scores(registry, weights, card, tested, budget, of) for of in (torch.float32, dtype))
    defects = np.array([image.is_defect for image in each.test])
    return {"set": each.name} | compare(exact, fast, defects, card.threshold)


def _scores(
    registry: Registry, weights: Weights, card: ModelCard, tested: np.ndarray, budget: Budget, dtype: torch.dtype
) -> np.ndarray:
    """Judge (N, S, S, 3) uint8 RGB images by an engine of its own; return (N,) float64 scores.

    On a GPU float32 is what its name says here: convolutions would be computed in TF32, ten bits of mantissa.
    """
    torch.backends.cudnn.allow_tf32 = False
    with contextlib.closing(make_engine(registry, weights, budget, dtype)) as engine:
        resident = engine.build(card.product, card.version)
        engine.install(resident)
        await_ready(engine)
        scores: list[float] = []
        for first in range(0, len(tested), _BATCH):
            judged = engine.judge([Request(resident, image) for image in tested[first : first + _BATCH]])
            scores += [each.score for each in judged]
        return np.array(scores)


def compare(exact: np.ndarray, fast: np.ndarray, defects: np.ndarray, threshold: float) -> dict[str, Any]:
    """Compare two precisions' scores of the same frames.

    Args:
        exact: (N,) float32's.
        fast: (N,) of the fastest type.
        defects: (N,) bool.
        threshold: the version's.
    """
    flips = np.array([is_fail(a, threshold) != is_fail(b, threshold) for a, b in zip(exact, fast, strict=True)])
    away = np.minimum(abs(exact - threshold), abs(fast - threshold)) > _NEAR * threshold
    aurocs = [_percent(image_auroc(scores, defects)) for scores in (exact, fast)]
    return {
        "frames": len(exact),
        "frames_away": int(away.sum()),
        "threshold": threshold,
        "image_auroc_float32": aurocs[0],
        "image_auroc": aurocs[1],
        "auroc_points": round(aurocs[1] - aurocs[0], 4),
        "flips": int(flips.sum()),
        "flips_away": int((flips & away).sum()),
        "flip_share": round(float(flips.mean()), 6),
        "flips_away_share": round(float((flips & away).mean()), 6),
        "largest_score_change": round(float((abs(fast - exact) / abs(exact)).max()), 6),
    }


def _percent(share: float | None) -> float:
    if share is None:
        raise ModelError("a set without both normal and defective test images has no AUROC")
    return round(share * 100, 4)


def _overall(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what counts over all sets: the largest change of AUROC, and the shares of all frames."""
    frames, flips, away = (sum(each[name] for each in sets) for name in ("frames", "flips", "flips_away"))
    points = max((each["auroc_points"] for each in sets), key=abs)
    return {
        "frames": frames,
        "auroc_points": points,
        "flips": flips,
        "flip_share": round(flips / frames, 6),
        "flips_away": away,
        "flips_away_share": round(away / frames, 6),
        "is_accepted": abs(points) <= _AUROC_POINTS and away / frames <= _FLIP_SHARE,
    }


if __name__ == "__main__":
    main()
