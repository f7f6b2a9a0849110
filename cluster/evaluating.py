"""`proctor evaluate`: accuracy of a way of training on labelled sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.errors import ConfigError
from models.evaluation import Evaluation, evaluate
from models.settings import TrainingSettings, recipe


def evaluate_sets(
    data: Path,
    recipe_name: str,
    overrides: dict[str, Any],
    seeds_and_out: tuple[Sequence[int], Path | None],
    console: Console,
) -> Evaluation:
    """Train and judge each set, with a progress bar per training.

    Args:
        data: a set or a folder of sets.
        recipe_name: the settings to start from.
        overrides: settings that differ.
        seeds_and_out: a training for each seed; where scores go.
        console: for the progress.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: the data or the teacher's weights are.
    """
    try:
        settings = TrainingSettings.model_validate(recipe(recipe_name).model_dump() | overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"--{name} {first['input']}: {first['msg']}") from None
    seeds, to = seeds_and_out
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None, loss="")

        def show(name: str, step: int, steps: int, loss: float) -> None:
            progress.update(task, description=name, total=steps, completed=step, loss=f"loss {loss:.4f}")

        return evaluate(data, settings, to, show, seeds)


def evaluation_table(evaluation: Evaluation) -> Table:
    """The table of `proctor evaluate`."""
    settings = evaluation.settings
    title = (
        f"{settings.detector}, {settings.teacher}, {settings.input_size}², {settings.steps} steps, {evaluation.device}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    names = ("set", "seed", "train", "test good/defect", "image AUROC", "pixel AUROC")
    for name in (*names, "false rejects", "detected", "training", "frames/s"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for each in evaluation.results:
        table.add_row(
            each.name,
            str(each.seed),
            str(each.train_images),
            f"{each.test_good}/{each.test_defects}",
            f"{each.image_auroc * 100:.2f} %",
            "-" if each.pixel_auroc is None else f"{each.pixel_auroc * 100:.2f} %",
            f"{each.false_reject_rate * 100:.1f} %",
            f"{each.detection_rate * 100:.1f} %",
            f"{each.train_seconds:.1f} s",
            f"{each.frames_per_s:.0f}",
        )
    return table
