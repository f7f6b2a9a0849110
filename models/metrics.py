"""Measures of detection: ROC curves and the area under them, per image and per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class RocCurve(NamedTuple):
    """Points of a receiver operating characteristic, from (0, 0) to (1, 1).

    Attributes:
        false_positive_rate: (T,) float64, ascending.
        true_positive_rate: (T,) float64, ascending.
        thresholds: (T,) float64, descending; a score at or above it counts as positive. The first is
            infinite.
    """

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    thresholds: np.ndarray


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> RocCurve:
    """Return the ROC with a point for each distinct score.

    Args:
        scores: (N,) float, higher is more anomalous.
        labels: (N,) bool, True for a defect; both kinds must occur.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order].astype(bool)
    # Equal scores are one point: no threshold separates them.
    last_of_ties = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true_positives = np.cumsum(positive)[last_of_ties]
    false_positives = np.cumsum(~positive)[last_of_ties]
    return RocCurve(
        np.append(0.0, false_positives / false_positives[-1]),
        np.append(0.0, true_positives / true_positives[-1]),
        np.append(np.inf, ranked[last_of_ties].astype(np.float64)),
    )


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the probability that a defect scores above a normal image, a tie counting half.

    Args:
        scores: (N,) float, higher is more anomalous.
        labels: (N,) bool, True for a defect.

    Returns:
        0..1, or None when only one kind of image is there.
    """
    labels = labels.astype(bool)
    return _auroc(np.sort(scores[labels]), [scores[~labels]])


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float | None:
    """Return the AUROC over all pixels of all images, exact with ties.

    Beside the maps themselves it holds the defective pixels and one image at a time, so thousands of images
    fit.

    Args:
        maps: Anomaly maps, each (H, W) float.
        masks: Ground truth, each (H, W) bool of its map's shape, True where defective.

    Returns:
        0..1, or None when only one kind of pixel is there.
    """
    defective = [scores[mask] for scores, mask in zip(maps, masks, strict=True)]
    normal = (scores[~mask] for scores, mask in zip(maps, masks, strict=True))
    return _auroc(np.sort(np.concatenate(defective)) if defective else np.empty(0), normal)


def _auroc(positives: np.ndarray, negatives: Iterable[np.ndarray]) -> float | None:
    """Return the Mann-Whitney statistic over the number of pairs.

    Args:
        positives: (P,) sorted ascending.
        negatives: Iterable of arrays of any length.
    """
    wins, count = 0, 0
    for chunk in negatives:
        above = 2 * len(positives) * len(chunk)
        left = np.searchsorted(positives, chunk, side="left")
        right = np.searchsorted(positives, chunk, side="right")
        # In half pairs, as Python integers: exact however many pixels there are.
        wins += above - int(left.sum()) - int(right.sum())
        count += len(chunk)
    return wins / (2 * len(positives) * count) if count and len(positives) else None
