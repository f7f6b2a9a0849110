"""How well a way of training detects defects, measured on labelled sets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models import metrics
from models.calibration import is_fail
from models.datasets import GOOD, InspectionSet, LabelledImage, find_sets, read_mask
from models.detectors import make_detector
from models.errors import TrainingDataError
from models.figures import Evaluation, KindResult, SetResult, summarise
from models.images import read_training_images
from models.inference import pick_device
from models.judging import judge, speed
from models.settings import TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import TrainedStudent, train

_BATCH = 16


@dataclass(frozen=True)
class EvaluationStep:
    """Where an evaluation is.

    Attributes:
        name: The set's.
        seed: The training's.
        phase: 'reading', 'training', 'judging' or 'measuring'.
        done: Steps or images of this phase so far.
        total: Of how many, None where that is unknown.
        loss: The training's, None in other phases.
    """

    name: str
    seed: int
    phase: str
    done: int = 0
    total: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Judged:
    """A set's test images, judged by one student; all in the set's order.

    Attributes:
        tested: The set.
        settings: The training's, its seed too.
        result: Its figures.
        maps: (N, S, S) float32 anomaly maps.
        scores: (N,) float32.
        fails: (N,) bool, True where rejected.
    """

    tested: InspectionSet
    settings: TrainingSettings
    result: SetResult
    maps: np.ndarray
    scores: np.ndarray
    fails: np.ndarray


EvaluationProgress = Callable[[EvaluationStep], None]
OnJudged = Callable[[Judged], None]


def evaluate(
    data_dir: str | Path,
    settings: TrainingSettings,
    seeds: Sequence[int] | None = None,
    progress: EvaluationProgress | None = None,
    on_judged: OnJudged | None = None,
) -> Evaluation:
    """Train on each set's normal images and judge its test images.

    Args:
        data_dir: A labelled set, or a folder of such sets, see `models.datasets`.
        settings: How to train.
        seeds: One training for each; None takes the settings' own.
        progress: Called often.
        on_judged: Called after each training; only it sees maps and scores, they are not kept.

    Raises:
        TrainingDataError: The folder is no labelled set, an image is unreadable or a kind of test image is
            missing.
        ModelError: As for `models.training.train`.
    """
    sets = find_sets(data_dir)
    for each in sets:
        if len({image.is_defect for image in each.test}) < 2:
            raise TrainingDataError(
                f"{each.name}: its test images are all of one kind; measuring needs good and defective ones: {data_dir}"
            )
    detector = make_detector(settings.detector, settings.detector_options)
    teacher = load_teacher(settings.teacher, settings.weights)
    seeded = [settings.model_copy(update={"seed": seed}) for seed in seeds or (settings.seed,)]
    results = []
    for each in sets:
        for judged in _judge_set(each, seeded, teacher, progress or (lambda step: None)):
            results.append(judged.result)
            if on_judged is not None:
                on_judged(judged)
    of_sets, mean = summarise(results)
    return Evaluation(
        detector=settings.detector,
        detector_options=detector.model_dump(mode="json"),
        teacher=teacher.name,
        teacher_sha256=teacher.weights_sha256,
        settings=settings,
        device=str(pick_device(settings.device)),
        results=results,
        sets=of_sets,
        mean=mean,
    )


def _judge_set(
    each: InspectionSet, seeded: Sequence[TrainingSettings], teacher: Teacher, progress: EvaluationProgress
) -> Iterator[Judged]:
    """Yield what each training's student says of the set; its images are read once for all of them."""
    size = seeded[0].input_size
    progress(EvaluationStep(each.name, seeded[0].seed, "reading"))
    normals, _ = read_training_images(each.train, size)
    images, _ = read_training_images([image.path for image in each.test], size)
    masks = _Masks(each.test) if each.has_masks else None
    for _ in masks or ():
        pass  # a mask that is wrong is found before hours of training, not after
    for settings in seeded:
        step = EvaluationStep(each.name, settings.seed, "training", 0, settings.steps)

        def show(done: int, steps: int, loss: float, step: EvaluationStep = step) -> None:
            progress(replace(step, done=done, total=steps, loss=loss))

        progress(step)
        trained = train(normals, settings, teacher=teacher, progress=show)
        yield _judge(each, trained, images, masks, progress)


def _judge(
    each: InspectionSet,
    trained: TrainedStudent,
    images: np.ndarray,
    masks: _Masks | None,
    progress: EvaluationProgress,
) -> Judged:
    step = EvaluationStep(each.name, trained.settings.seed, "judging", 0, len(images))
    progress(step)
    maps, scores, _ = judge(trained, images, lambda done: progress(replace(step, done=done)))
    progress(replace(step, phase="measuring", total=None))
    threshold = trained.calibration.threshold
    defects = np.array([image.is_defect for image in each.test])
    fails = np.array([is_fail(score, threshold) for score in scores])
    of_pixels = (None, None, None) if masks is None else _of_pixels(maps, masks)
    result = SetResult(
        name=each.name,
        seed=trained.settings.seed,
        train_images=len(each.train),
        test_good=int((~defects).sum()),
        test_defects=int(defects.sum()),
        image_auroc=_among_both(metrics.image_auroc(scores, defects)),
        average_precision=_among_both(metrics.average_precision(scores, defects)),
        pixel_auroc=of_pixels[0],
        aupro_30=of_pixels[1],
        aupro_5=of_pixels[2],
        threshold=threshold,
        held_out=len(trained.calibration.scores),
        without_mask=len(each.without_mask),
        false_reject_rate=float(fails[~defects].mean()),
        detection_rate=float(fails[defects].mean()),
        train_seconds=trained.seconds,
        frames_per_s=speed(trained, images, _BATCH),
        frames_per_s_single=speed(trained, images, 1),
        kinds=_of_kinds(each, scores, fails),
    )
    return Judged(each, trained.settings, result, maps, scores, fails)


def _of_pixels(maps: np.ndarray, masks: _Masks) -> tuple[float | None, float | None, float | None]:
    """Return the AUROC of pixels and the AUPRO up to 30 % and to 5 %."""
    overlap = metrics.aupro(maps, masks, (0.3, 0.05)) or {}
    return metrics.pixel_auroc(maps, masks), overlap.get(0.3), overlap.get(0.05)


def _of_kinds(each: InspectionSet, scores: np.ndarray, fails: np.ndarray) -> list[KindResult]:
    of_image = np.array([image.kind for image in each.test])
    good = of_image == GOOD
    results = []
    for kind in sorted(set(of_image.tolist()), key=lambda kind: (kind != GOOD, kind)):
        chosen = of_image == kind
        pair = good | chosen
        auroc = None if kind == GOOD else metrics.image_auroc(scores[pair], chosen[pair])
        results.append(
            KindResult(kind=kind, images=int(chosen.sum()), rejected=int(fails[chosen].sum()), image_auroc=auroc)
        )
    return results


def _among_both(figure: float | None) -> float:
    """Return a figure that is None only where one kind of image is missing, which `evaluate` refuses."""
    assert figure is not None
    return figure


class _Masks(Collection[np.ndarray]):
    """The ground truth of test images at its own size, read anew each time: sets of large masks fit."""

    def __init__(self, images: Sequence[LabelledImage]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (read_mask(image) for image in self._images)

    def __contains__(self, mask: object) -> bool:
        return any(mask is each for each in self)
