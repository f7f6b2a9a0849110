"""`proctor evaluate`: accuracy and speed of detectors on labelled sets, with a report to look at."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.calibration import few_scores
from models.evaluation import EvaluationProgress, EvaluationStep, evaluate
from models.figures import Evaluation
from models.settings import TrainingSettings


def evaluate_detectors(
    data: Path, chosen: Sequence[TrainingSettings], seeds: Sequence[int], to: Path | None, console: Console
) -> list[Evaluation]:
    """Train and judge every set with every detector.

    Args:
        data: a set or a folder of sets.
        chosen: the settings of each detector.
        seeds: a training for each.
        to: folder for the report; None writes nothing.
        console: for the progress.

    Raises:
        ConfigError: the report's folder cannot be written to.
        ModelError: the data or the teacher's weights are wrong.
    """
    with _progress(console) as show:
        if to is None:
            return [evaluate(data, each, seeds, show) for each in chosen]
        from cluster.evaluation_report import EvaluationReport

        report = EvaluationReport(to, seeds[0], show)
        evaluations = [evaluate(data, each, seeds, show, report.add) for each in chosen]
        report.finish(data.resolve().name, evaluations)
        return evaluations


@contextmanager
def _progress(console: Console) -> Iterator[EvaluationProgress]:
    """What shows where the evaluation is: a bar on a terminal, elsewhere a line for each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    loss = TextColumn("{task.fields[loss]}")
    with Progress(*columns, loss, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None, loss="")
        last = ""

        def show(step: EvaluationStep) -> None:
            nonlocal last
            text = f"{step.name}, seed {step.seed}: {step.phase}"
            if text != last and not console.is_terminal:
                console.print(f"· {text}", markup=False, highlight=False)
            last = text
            loss = "" if step.loss is None else f"loss {step.loss:.4f}"
            progress.update(task, description=text, total=step.total, completed=step.done, loss=loss)

        yield show


def remarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """What a reader of the figures should know: thresholds that rest on few images, masks that are missing."""
    rate = evaluations[0].settings.false_reject_rate
    few = {
        result.name: remark
        for each in evaluations
        for result in each.results
        if (remark := few_scores(result.held_out, rate))
    }
    results = [result for each in evaluations for result in each.results]
    partly = {each.name: each for each in results if 0 < each.without_mask < each.test_defects}
    masks = [
        f"{name}: {each.without_mask} of {each.test_defects} defects lack a mask, so pixels are not measured"
        for name, each in partly.items()
    ]
    return masks + [f"{name}: {remark}" for name, remark in few.items()]
