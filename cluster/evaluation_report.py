"""The files of an evaluation's report: figures, scores, curves, exhibits and the page that shows them."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigError
from cluster.exhibits import draw_exhibits
from cluster.gallery import Section, write_page
from cluster.plots import draw_roc, draw_scores, draw_summary
from models.evaluation import EvaluationProgress, EvaluationStep, Judged
from models.figures import Evaluation, as_document


class EvaluationReport:
    """The report, written as the sets are judged; of a set's maps nothing stays in memory.

    Args:
        out: its folder, made where it is missing.
        shown_seed: the training whose curves and exhibits are drawn.
        show: told when drawing begins.

    Raises:
        ConfigError: the folder cannot be written to; from every method.
    """

    def __init__(self, out: Path, shown_seed: int, show: EvaluationProgress) -> None:
        self._out, self._shown_seed, self._show = out, shown_seed, show
        self._sections: list[Section] = []
        with _writing(out):
            (out / "images").mkdir(parents=True, exist_ok=True)

    def add(self, judged: Judged) -> None:
        """Write the scores and, of the seed to show, draw curves and exhibits."""
        detector, name, seed = judged.settings.detector, judged.result.name, judged.result.seed
        table, folder = f"scores/{detector}/{name}-seed{seed}.csv", f"images/{detector}/{name}"
        with _writing(self._out):
            _write_scores(self._out / table, judged)
            if seed != self._shown_seed:
                return
            self._show(EvaluationStep(name, seed, "drawing"))
            (self._out / folder).mkdir(parents=True, exist_ok=True)
            draw_roc(judged, self._out / folder / "roc.png")
            draw_scores(judged, self._out / folder / "scores.png")
            groups = draw_exhibits(judged, self._out, folder)
        section = Section(detector, judged.result, groups, f"{folder}/roc.png", f"{folder}/scores.png", table)
        self._sections.append(section)

    def finish(self, data: str, evaluations: Sequence[Evaluation]) -> None:
        """Write the figures and the page.

        Args:
            data: name of the set or the folder of sets.
            evaluations: one for each detector.
        """
        with _writing(self._out):
            text = json.dumps(as_document(evaluations), indent=2) + "\n"
            (self._out / "evaluation.json").write_text(text, encoding="utf-8")
            summary = "images/summary.png" if len(self._sections) > 1 else None
            if summary is not None:
                draw_summary(evaluations, self._out / summary)
            write_page(self._out / "index.html", data, evaluations, self._sections, summary)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A report that cannot be written is the user's to mend, in one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error} ({error.filename})") from None


def _write_scores(path: Path, judged: Judged) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "kind", "score", "verdict"))
        for image, score, fail in zip(judged.tested.test, judged.scores, judged.fails, strict=True):
            writer.writerow((image.path.name, image.kind, f"{score:.9g}", "fail" if fail else "pass"))
