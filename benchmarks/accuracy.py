"""Accuracy of every detector on labelled sets, over seeds, with the ablations behind the defaults.

    python -m benchmarks.accuracy --data ../shared/data --weights resnet18.safetensors --suite table --suite asymts \
        --journal accuracy.jsonl --beside benchmarks/results/memory_bank.json --json benchmarks/results/accuracy.json

Each training is a line of the journal, so a run that was cut short goes on where it stopped; the document is made
from the whole journal, and with `--onto` from that of earlier runs, whose rows stay where this journal has none or
fewer seeds or sets. A line or row counts as long as its way is the same in every setting and option, defaults too.
Speed is not measured here, since trainings run side by side: see `benchmarks.speed`.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy_suites import SUITES, TEACHERS, Way, suite
from benchmarks.accuracy_tables import joined, summarise
from benchmarks.machine import describe_machine
from models import metrics
from models.datasets import InspectionSet, find_sets, read_mask
from models.detector import Detector, Student
from models.detectors import make_detector
from models.features import TeacherFeatures
from models.holdout import split_holdout
from models.images import read_training_images
from models.inference import best_dtype, pick_device, prepare
from models.settings import TrainingSettings
from models.statistics import MapStatistics
from models.teachers import Teacher, load_teacher
from models.training import train


def main() -> None:
    """Train what the journal lacks, then write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a labelled set, or a folder of sets")
    parser.add_argument("--weights", type=Path, help="local ResNet-18 weights; else torchvision's are downloaded")
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; else the table alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only ways and sets that contain this text")
    parser.add_argument("--teacher", action="append", choices=TEACHERS, help="may be repeated; else both")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side, a CPU thread each")
    parser.add_argument("--journal", type=Path, required=True, help="a line of JSON for each training")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="documents of other programs to include")
    parser.add_argument("--onto", type=Path, help="an earlier document; rows of ways that are unchanged stay")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    earlier = json.loads(options.onto.read_text()) if options.onto else None
    done = {_key_of(entry) for entry in _entries(options.journal)}
    tasks = [task for task in _tasks(options) if _key(task) not in done]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, initializer=_one_thread, initargs=(options.workers,)) as pool:
        for number, entry in enumerate(pool.imap_unordered(_run, tasks), start=1):
            with options.journal.open("a") as journal:
                journal.write(json.dumps(entry) + "\n")
            first = next(iter(entry["views"].values()))
            minutes = (time.perf_counter() - started) / 60
            print(
                f"{number}/{len(tasks)} after {minutes:.1f} min: {entry['suite']} {entry['way']}, {entry['teacher']}, "
                f"{entry['set']}, seed {entry['seed']}: image AUROC {first['image_auroc'] * 100:.2f} %",
                flush=True,
            )
    measured = summarise(_current(_entries(options.journal)))
    if earlier is not None:
        ways = {(way.suite, way.name, teacher): way.fingerprint for way in _all_ways() for teacher in way.teachers}
        measured = joined(earlier, measured, ways)
    document = measured | {
        "command": "python -m benchmarks.accuracy --data SETS --weights FILE --journal FILE --suite NAME --workers 2",
        "machine": describe_machine(),
        "device": str(pick_device()),
        "beside": measured.get("beside", {}) | {path.stem: json.loads(path.read_text()) for path in options.beside},
    }
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    else:
        print(text, end="")


def _tasks(options: argparse.Namespace) -> Iterator[tuple[Way, str, InspectionSet, int, str | None]]:
    """Yield (way, teacher, set, seed, weights), one seed after the other so that a cut run has whole rows."""
    sets = find_sets(options.data)
    weights = str(options.weights) if options.weights else None
    for seed in range(options.seeds):
        for way in (way for name in options.suite or ["table"] for way in suite(name)):
            for teacher in (name for name in way.teachers if name in (options.teacher or TEACHERS)):
                for each in sets:
                    wanted = way.sets is None or each.name in way.sets
                    if wanted and options.only in f"{way.name} {each.name}":
                        yield way, teacher, each, seed, weights


def _key(task: tuple[Way, str, InspectionSet, int, str | None]) -> tuple[Any, ...]:
    way, teacher, each, seed, _ = task
    return way.suite, way.name, teacher, each.name, seed, way.fingerprint


def _key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("suite", "way", "teacher", "set", "seed", "fingerprint"))


def _all_ways() -> Iterator[Way]:
    for name in SUITES:
        yield from suite(name)


def _current(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out lines of ways that have changed since."""
    known = {(way.suite, way.name, way.fingerprint) for way in _all_ways()}
    return [each for each in entries if (each["suite"], each["way"], each["fingerprint"]) in known]


def _entries(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def _one_thread(workers: int) -> None:
    if workers > 1:
        torch.set_num_threads(1)


_read: dict[tuple[str, int], tuple[InspectionSet, np.ndarray, np.ndarray]] = {}


def _images(each: InspectionSet, size: int) -> tuple[InspectionSet, np.ndarray, np.ndarray]:
    """Return a set with its normal and its test images; those of the last size are kept."""
    key = (each.name, size)
    if key not in _read:
        for other in [other for other in _read if other[1] != size]:
            del _read[other]
        _read[key] = _read_set(each, size)
    return _read[key]


def _read_set(each: InspectionSet, size: int) -> tuple[InspectionSet, np.ndarray, np.ndarray]:
    normals, _ = read_training_images(each.train, size)
    tested, _ = read_training_images([image.path for image in each.test], size)
    return each, normals, tested


@functools.lru_cache(maxsize=2)
def _teacher(name: str, weights: str | None) -> Teacher:
    return load_teacher(name, weights if name == "resnet18" else None)


def _run(task: tuple[Way, str, InspectionSet, int, str | None]) -> dict[str, Any]:
    """Train once and judge by every view; a line of the journal."""
    way, teacher_name, described, seed, weights = task
    settings = way.settings.model_copy(
        update={"teacher": teacher_name, "seed": seed, "threads": torch.get_num_threads()}
    )
    each, normals, tested = _images(described, settings.input_size)
    teacher = _teacher(teacher_name, weights)
    trained = train(normals, settings, teacher=teacher)
    _, held_out = split_holdout(normals, settings.holdout)
    detectors = {view: _changed(settings, changes) for view, changes in way.views.items()}
    views = judge_views(detectors, teacher, trained.student, (normals[held_out], tested), settings)
    return {
        "suite": way.suite,
        "way": way.name,
        "fingerprint": way.fingerprint,
        "teacher": teacher_name,
        "set": each.name,
        "seed": seed,
        "train_images": len(normals),
        "train_seconds": round(trained.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in trained.student.parameters()),
        "settings": way.described,
        "view_changes": way.views,
        "views": {view: _figures(each, maps, scores) for view, (maps, scores) in views.items()},
    }


def _changed(settings: TrainingSettings, changes: dict[str, Any]) -> Detector:
    """Return the trained detector with dotted options changed."""
    options = make_detector(settings.detector, settings.detector_options).model_dump()
    for name, value in changes.items():
        place, *inner = name.split(".")
        options = options | ({place: options[place] | {inner[0]: value}} if inner else {place: value})
    return make_detector(settings.detector, options)


@torch.inference_mode()
def judge_views(
    detectors: dict[str, Detector],
    teacher: Teacher,
    student: Student,
    images: tuple[np.ndarray, np.ndarray],
    settings: TrainingSettings,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Judge by several detectors with one pass of the student.

    Args:
        detectors: By the view's name; all take the student's pairs.
        teacher: float32, on the CPU.
        student: Likewise.
        images: Held-out normals and test images, (N, S, S, 3) uint8 RGB each.
        settings: The training's.

    Returns:
        By view, (N, S, S) float32 maps and (N,) scores of the test images.
    """
    device = pick_device(settings.device)
    dtype = best_dtype(device)
    ready_teacher, ready = prepare(teacher, device, dtype), prepare(student, device, dtype)
    held_out, tested = (TeacherFeatures(ready_teacher, each, cache_bytes=0) for each in images)
    measured: dict[str, list[tuple[torch.Tensor, ...]]] = {view: [] for view in detectors}
    for chunk in held_out.chunks():
        pairs = ready(*held_out.batch(chunk))
        for view, detector in detectors.items():
            measured[view].append(detector.scale_maps(pairs))
    statistics = {}
    for view, maps in measured.items():
        statistics[view] = MapStatistics(len(maps[0])).to(device)
        statistics[view].measure(maps)
    results: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {view: ([], []) for view in detectors}
    for chunk in tested.chunks():
        pairs = ready(*tested.batch(chunk))
        for view, detector in detectors.items():
            fused = detector.fuse(detector.scale_maps(pairs), settings.input_size, statistics[view])
            results[view][0].append(fused.cpu().numpy())
            results[view][1].append(detector.score(fused).cpu().numpy())
    return {view: (np.concatenate(maps), np.concatenate(scores)) for view, (maps, scores) in results.items()}


def _figures(each: InspectionSet, maps: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    defects = np.array([image.is_defect for image in each.test])
    figures = {
        "image_auroc": metrics.image_auroc(scores, defects),
        "average_precision": metrics.average_precision(scores, defects),
    }
    if each.has_masks:
        masks = [read_mask(image) for image in each.test]
        overlap = metrics.aupro(maps, masks, (0.3, 0.05)) or {}
        figures |= {
            "pixel_auroc": metrics.pixel_auroc(maps, masks),
            "aupro_30": overlap.get(0.3),
            "aupro_5": overlap.get(0.05),
        }
    return figures


if __name__ == "__main__":
    main()
