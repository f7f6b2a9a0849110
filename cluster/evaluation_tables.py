"""The tables of an evaluation, as rows of text: the terminal and the page show the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from models.figures import Evaluation, Figures, SetResult, Summary

_MOST_SETS_ACROSS = 4
_DETECTION = {
    "image_auroc": "image AUROC %",
    "average_precision": "AP %",
    "pixel_auroc": "pixel AUROC %",
    "aupro_30": "AUPRO 30 %",
    "aupro_5": "AUPRO 5 %",
    "false_reject_rate": "false rejects %",
    "detection_rate": "detected %",
}
_SPEED = {"frames_per_s": "frames/s", "frames_per_s_single": "frames/s one by one", "train_seconds": "training s"}


@dataclass(frozen=True)
class TextTable:
    """A table whose first row names the columns and whose first column names the rows."""

    title: str
    rows: list[list[str]]

    def render(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for index, name in enumerate(self.rows[0]):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in self.rows[1:]:
            table.add_row(*row)
        return table


def evaluation_tables(evaluations: Sequence[Evaluation]) -> list[TextTable]:
    """What a terminal shows: detection, then speed, for several detectors within the comparison."""
    tables = [detection_table(each) for each in evaluations]
    last = speed_table(evaluations[0]) if len(evaluations) == 1 else comparison_table(evaluations)
    return [*tables, last]


def detection_table(evaluation: Evaluation) -> TextTable:
    """How well defects are found and located."""
    settings = evaluation.settings
    rows = [["set", "seed", *_DETECTION.values()]]
    for name, seed, mean, spread in _rows_of(evaluation):
        rows.append([name, seed, *(_percent(mean, spread, figure) for figure in _DETECTION)])
    title = f"{evaluation.detector}, {evaluation.teacher}, {settings.input_size}², {settings.steps} steps"
    return TextTable(title, rows)


def speed_table(evaluation: Evaluation) -> TextTable:
    """What the trainings were given and how long training and judging took."""
    rows = [["set", "seed", "train images", "test good/defect", "threshold", *_SPEED.values()]]
    given = {(each.name, str(each.seed)): each for each in evaluation.results}
    for name, seed, mean, spread in _rows_of(evaluation):
        counts = _counts(given.get((name, seed)))
        rows.append([name, seed, *counts, *(_number(mean, spread, figure, 1) for figure in _SPEED)])
    return TextTable(f"{evaluation.detector}: training and speed on {evaluation.device}", rows)


def comparison_table(evaluations: Sequence[Evaluation]) -> TextTable:
    """Detectors side by side; where there are many sets, they go down instead of across."""
    rows = [["detector"]]
    for each in _with_mean(evaluations[0]):
        rows[0] += [f"{each.name} AUROC %", f"{each.name} AUPRO %"]
    rows[0] += _SPEED.values()
    for evaluation in evaluations:
        row = [evaluation.detector]
        for each in _with_mean(evaluation):
            row += [_percent(each.mean, each.spread, figure) for figure in ("image_auroc", "aupro_30")]
        mean = evaluation.mean
        rows.append([*row, *(_number(mean.mean, mean.spread, figure, 1) for figure in _SPEED)])
    # where no set has masks, the columns of AUPRO would be empty
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows[1:])]
    rows = [[row[i] for i in kept] for row in rows]
    if len(evaluations[0].sets) > _MOST_SETS_ACROSS:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return TextTable(f"comparison on {evaluations[0].device}", rows)


def _with_mean(evaluation: Evaluation) -> list[Summary]:
    """The sets and, where there are several, their mean."""
    return [*evaluation.sets, evaluation.mean] if len(evaluation.sets) > 1 else evaluation.sets


def _rows_of(evaluation: Evaluation) -> list[tuple[str, str, Figures, Figures | None]]:
    """Each training; after the last seed of a set its mean and spread; after the last set the mean of all."""
    rows: list[tuple[str, str, Figures, Figures | None]] = []
    for each in evaluation.sets:
        rows += [(each.name, str(one.seed), one, None) for one in evaluation.results if one.name == each.name]
        if each.seeds > 1:
            rows.append(_summary_row(each))
    if len(evaluation.sets) > 1:
        rows.append(_summary_row(evaluation.mean))
    return rows


def _summary_row(summary: Summary) -> tuple[str, str, Figures, Figures | None]:
    return summary.name, "all" if summary.seeds > 1 else "", summary.mean, summary.spread


def _counts(result: SetResult | None) -> list[str]:
    if result is None:
        return ["", "", ""]
    return [str(result.train_images), f"{result.test_good}/{result.test_defects}", f"{result.threshold:.3g}"]


def _percent(mean: Figures, spread: Figures | None, figure: str) -> str:
    return _number(mean, spread, figure, 2, 100)


def _number(mean: Figures, spread: Figures | None, figure: str, digits: int, factor: float = 1) -> str:
    value = getattr(mean, figure)
    if value is None:
        return "-"
    text = f"{value * factor:,.{digits}f}"
    return text if spread is None else f"{text} ± {getattr(spread, figure) * factor:,.{digits}f}"
