"""The figures of an evaluation: of one training, of a set over its seeds, and of all sets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from models.settings import TrainingSettings


class Figures(BaseModel):
    """What is measured of one training, or a mean or a spread of that.

    Attributes:
        image_auroc: 0..1.
        average_precision: Of the images, 0..1.
        pixel_auroc: 0..1, None where masks are missing.
        aupro_30: Per-region overlap up to 30 % false positive pixels, 0..1, None where masks are missing.
        aupro_5: The same up to 5 %.
        false_reject_rate: Share of normal test images above the threshold.
        detection_rate: Share of defective test images above the threshold.
        train_seconds: Duration of the training.
        frames_per_s: Judged a second in batches of 16, teacher and student, warm-up excluded.
        frames_per_s_single: The same one by one.
    """

    model_config = ConfigDict(frozen=True)

    image_auroc: float
    average_precision: float
    pixel_auroc: float | None
    aupro_30: float | None
    aupro_5: float | None
    false_reject_rate: float
    detection_rate: float
    train_seconds: float
    frames_per_s: float
    frames_per_s_single: float


class KindResult(BaseModel):
    """How one kind of test image fared.

    Attributes:
        kind: 'good' or the defect's name.
        images: Number of them.
        rejected: Those above the threshold.
        image_auroc: This defect against the normal images, 0..1; None for the normal ones.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    images: int
    rejected: int
    image_auroc: float | None


class SetResult(Figures):
    """One student's figures on one set.

    Attributes:
        name: The set's.
        seed: The training's.
        train_images: Normal images given to the training.
        test_good: Normal test images.
        test_defects: Defective test images.
        threshold: From the training's own held-out normals.
        held_out: How many they were.
        without_mask: Defective test images that lack a mask; with any, nothing is measured of pixels.
        kinds: The kinds of test image, the normal ones first.
    """

    name: str
    seed: int
    train_images: int
    test_good: int
    test_defects: int
    threshold: float
    held_out: int
    without_mask: int
    kinds: list[KindResult]


class Summary(BaseModel):
    """Figures over seeds.

    Attributes:
        name: The set's, or 'mean' for the mean over sets.
        seeds: Trainings it rests on.
        mean: Over the seeds.
        spread: Sample standard deviation over the seeds, None with one seed.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    seeds: int
    mean: Figures
    spread: Figures | None


class Evaluation(BaseModel):
    """Figures of one way of training, over sets and seeds.

    Attributes:
        detector: The method.
        detector_options: All of its options, those that were left at their default too.
        teacher: The frozen network.
        teacher_sha256: Of the teacher's weights file.
        settings: How the students were trained; each result names its seed.
        device: Where it was computed.
        results: One for each set and seed.
        sets: One for each set.
        mean: Over the sets; of pixels over those that have masks.
    """

    model_config = ConfigDict(frozen=True)

    detector: str
    detector_options: dict[str, Any]
    teacher: str
    teacher_sha256: str
    settings: TrainingSettings
    device: str
    results: list[SetResult]
    sets: list[Summary]
    mean: Summary


def summarise(results: Sequence[SetResult]) -> tuple[list[Summary], Summary]:
    """Return a summary of each set in order, and that of the mean over sets.

    Args:
        results: Every set with the same seeds; at least one.
    """
    names, seeds = (list(dict.fromkeys(values)) for values in zip(*((r.name, r.seed) for r in results), strict=True))
    sets = [_over_seeds(name, [each for each in results if each.name == name]) for name in names]
    # Each seed's mean over the sets first: their spread is that of the number a table quotes.
    means = [_mean([each for each in results if each.seed == seed]) for seed in seeds]
    return sets, _over_seeds("mean", means)


def as_document(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the JSON document of an evaluation, the same for one detector and for several."""
    return {"evaluations": [each.model_dump(mode="json") for each in evaluations]}


def _over_seeds(name: str, figures: Sequence[Figures]) -> Summary:
    spread = None if len(figures) < 2 else _each_figure(figures, statistics.stdev)
    return Summary(name=name, seeds=len(figures), mean=_mean(figures), spread=spread)


def _mean(figures: Sequence[Figures]) -> Figures:
    return _each_figure(figures, statistics.fmean)


def _each_figure(figures: Sequence[Figures], measure: Callable[[list[float]], float]) -> Figures:
    joined: dict[str, float | None] = {}
    for name in Figures.model_fields:
        known = [value for each in figures if (value := getattr(each, name)) is not None]
        joined[name] = measure(known) if known else None
    return Figures.model_validate(joined)
