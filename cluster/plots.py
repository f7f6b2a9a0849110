"""The curves of an evaluation as PNG pictures, readable on light and dark pages alike."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.datasets import GOOD
from models.evaluation import Judged
from models.figures import Evaluation
from models.metrics import roc_curve

_INK, _GRID, _GOOD, _LIMIT = "#1d2530", "#d5dae1", "#3b6ea8", "#1d2530"
# Okabe and Ito's colours, told apart by most colour-blind people
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B4FA3", "#8C6D31", "#0072B2")
_MARKERS = "osD^vPX*"
_BINS = 48


def draw_roc(judged: Judged, path: Path) -> None:
    """Draw the ROC of the whole set, of each kind of defect, and where the threshold lies on it.

    Args:
        judged: the set.
        path: the PNG to write.
    """
    figure, axes = _new(5.2, 4.8)
    kinds = np.array([image.kind for image in judged.tested.test])
    defects = kinds != GOOD
    by_kind = sorted(set(kinds[defects].tolist()))
    for index, kind in enumerate(by_kind if len(by_kind) > 1 else ()):
        chosen = ~defects | (kinds == kind)
        curve = roc_curve(judged.scores[chosen], defects[chosen])
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(curve[0] * 100, curve[1] * 100, color=colour, lw=1.2, label=_plain(kind))
    curve, result = roc_curve(judged.scores, defects), judged.result
    axes.plot(curve[0] * 100, curve[1] * 100, color=_INK, lw=2.4, label="all defects")
    point = (result.false_reject_rate * 100, result.detection_rate * 100)
    axes.plot(*point, "o", ms=9, mfc="white", mec=_INK, mew=2, label="at the threshold", clip_on=False, zorder=5)
    axes.plot((0, 100), (0, 100), color=_GRID, lw=1, zorder=0)
    axes.set(xlim=(-1, 101), ylim=(-1, 101), xlabel="good pieces rejected, %", ylabel="defects rejected, %")
    axes.set_title(_plain(f"{result.name}: image AUROC {result.image_auroc * 100:.2f} %"), loc="left", fontsize=11)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _save(figure, path)


def draw_scores(judged: Judged, path: Path) -> None:
    """Draw how the scores of each kind lie about the threshold: a histogram a row, all on one axis.

    Args:
        judged: the set.
        path: the PNG to write.
    """
    kinds = np.array([image.kind for image in judged.tested.test])
    result = judged.result
    ratios = judged.scores.astype(np.float64) / (result.threshold or 1.0)
    positive = ratios[ratios > 0]
    ratios = np.maximum(ratios, positive.min() if len(positive) else 1.0)
    edges = np.geomspace(min(ratios.min(), 0.8) / 1.02, max(ratios.max(), 1.25) * 1.02, _BINS)
    rows = result.kinds
    figure = Figure(figsize=(6.4, 0.9 + 0.75 * max(len(rows), 4)), layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, row) in enumerate(zip(all_axes, rows, strict=True)):
        colour = _GOOD if row.kind == GOOD else _COLOURS[(index - 1) % len(_COLOURS)]
        axes.hist(ratios[kinds == row.kind], bins=edges.tolist(), color=colour)
        axes.axvline(1.0, color=_LIMIT, lw=1.4, ls=(0, (4, 2)))
        axes.set(xscale="log", yticks=[])
        axes.set_ylabel(_plain(f"{row.kind}\n{row.images}"), rotation=0, ha="right", va="center", fontsize=9)
        _bare(axes)
        share = f"{row.rejected / row.images * 100:.0f} %\nrejected"
        axes.text(1.01, 0.5, share, transform=axes.transAxes, va="center", fontsize=9, color=_INK)
    title = _plain(f"{result.name}: scores about the threshold (dashed)")
    all_axes[0].set_title(title, loc="left", fontsize=11, color=_INK)
    _label_ratios(all_axes[-1], edges[0], edges[-1])
    _save(figure, path)


def draw_summary(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Draw every set's figures: AUROC, where there are masks AUPRO, and for several detectors their speed.

    Args:
        evaluations: of the same sets.
        path: the PNG to write.
    """
    figures = [("image_auroc", "image AUROC, %")]
    if any(each.mean.mean.aupro_30 is not None for each in evaluations):
        figures.append(("aupro_30", "AUPRO up to 30 %, %"))
    panels = len(figures) + (len(evaluations) > 1)
    rows = [*evaluations[0].sets, evaluations[0].mean] if len(evaluations[0].sets) > 1 else evaluations[0].sets
    figure = Figure(figsize=(4.4 * panels, 1.9 + 0.34 * max(len(rows), len(evaluations))), layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes, (name, label) in zip(all_axes, figures, strict=False):
        for index, evaluation in enumerate(evaluations):
            shown = [*evaluation.sets, evaluation.mean][: len(rows)]
            beside = 0.5 * ((index + 0.5) / len(evaluations) - 0.5)  # equal figures must not hide each other
            points = [(getattr(each.mean, name), place + beside) for place, each in enumerate(shown)]
            known = [(value * 100, place) for value, place in points if value is not None]
            axes.plot(*zip(*known, strict=True), **_marker(index), label=_plain(evaluation.detector))
        axes.set(xlabel=label, yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticklabels([_plain(each.name) for each in rows])
        _dress(axes)
    if len(evaluations) > 1:
        for index, each in enumerate(evaluations):
            all_axes[-1].plot(each.mean.mean.frames_per_s, each.mean.mean.image_auroc * 100, **_marker(index))
        all_axes[-1].set(xlabel="frames/s", ylabel="mean image AUROC, %")
        all_axes[-1].set_xlim(left=0)
        _dress(all_axes[-1])
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False)
    _save(figure, path)


def _marker(index: int) -> dict:
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "color": _COLOURS[index % len(_COLOURS)],
        "ms": 7,
        "ls": "",
        "clip_on": False,
    }


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    _bare(axes)
    axes.grid(color=_GRID, lw=0.7)
    axes.set_axisbelow(True)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(color=_GRID, labelcolor=_INK, labelsize=9)


def _label_ratios(axes: Axes, low: float, high: float) -> None:
    """Mark a logarithmic axis at plain numbers: 0.5, 1, 2 instead of powers of ten."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**e for e in range(-6, 7) for step in steps if low <= step * 10.0**e <= high]
        if len(ticks) > 4:
            break
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("score / threshold")


def _plain(text: str) -> str:
    """Text that is no formula, whatever a folder is called."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # a folder's name in letters that the font lacks shows as boxes; that is no reason to talk
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=150, facecolor="white")
