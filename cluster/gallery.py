"""The page of an evaluation: tables, curves and exhibits, whole in its folder and without any network."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from cluster.evaluation_tables import TextTable, comparison_table, detection_table, speed_table
from cluster.exhibits import Exhibit, Group
from cluster.page_style import STYLE
from models.figures import Evaluation, KindResult, SetResult

_LEGEND = (
    ("image AUROC", "the share of pairs of a defective and a good piece in which the defective one scores higher"),
    ("AP", "average precision: the mean share of true defects among all that score as high, over the defects"),
    ("pixel AUROC", "the same as image AUROC, of pixels against the ground truth"),
    (
        "AUPRO 30 % and 5 %",
        "how much of each defective region is marked, averaged up to that share of good pixels marked by mistake",
    ),
    ("false rejects, detected", "the share of good and of defective test images above the threshold"),
    ("threshold", "chosen at the training from normal images alone; no test image had a say"),
    ("frames/s", "images judged a second by teacher and student, 16 at once or one by one, after a warm-up"),
    ("±", "the sample standard deviation over the seeds"),
)


@dataclass(frozen=True)
class Section:
    """What the page shows of one detector on one set.

    Attributes:
        detector: its name.
        result: the figures of the training whose exhibits these are.
        groups: the exhibits.
        roc: picture of the ROC curve, relative to the page.
        scores: picture of the histograms, likewise.
        table: CSV of the scores, likewise.
    """

    detector: str
    result: SetResult
    groups: list[Group]
    roc: str
    scores: str
    table: str

    @property
    def title(self) -> str:
        """What tells it from other sections."""
        return f"{self.result.name}, {self.detector}"


def write_page(
    path: Path, data: str, evaluations: Sequence[Evaluation], sections: Sequence[Section], summary: str | None
) -> None:
    """Write the page; the pictures that it shows are already there.

    Args:
        path: of the page.
        data: name of the set or the folder of sets.
        evaluations: one for each detector, of the same sets.
        sections: one for each detector and set.
        summary: picture of all sets and detectors, relative to the page; None where there is but one.
    """
    names = [each.name for each in evaluations[0].sets]
    ordered = sorted(sections, key=lambda each: names.index(each.result.name))  # detectors of a set side by side
    anchors = [f"section-{number}" for number in range(1, len(ordered) + 1)]
    links = " ".join(
        f'<a href="#{anchor}">{escape(each.title)}</a>' for anchor, each in zip(anchors, ordered, strict=True)
    )
    body = [
        f"<header><h1>{escape(data)}</h1><p>{escape(_headline(evaluations))}</p></header>",
        f'<nav aria-label="Sets">{links}</nav>' if len(ordered) > 1 else "",
        "<main>",
        _summary(evaluations, summary),
        *(_section(each, anchor) for each, anchor in zip(ordered, anchors, strict=True)),
        _legend(),
        *(_settings(each) for each in evaluations),
        '<p>Every figure: <a href="evaluation.json">evaluation.json</a></p></main>',
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data)} - Proctor evaluation</title><style>{STYLE}</style></head><body>\n"
    )
    path.write_text(head + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")


def _headline(evaluations: Sequence[Evaluation]) -> str:
    detectors = ", ".join(each.detector for each in evaluations)
    seeds = evaluations[0].mean.seeds
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    trainings = f"{seeds} trainings a set" if seeds > 1 else "one training a set"
    return f"{detectors} · {evaluations[0].teacher} · {trainings} · {evaluations[0].device} · {made}"


def _summary(evaluations: Sequence[Evaluation], picture: str | None) -> str:
    parts = ["<section><h2>Summary</h2>"]
    if len(evaluations) > 1:
        parts.append(_table(comparison_table(evaluations)))
    if picture is not None:
        means = (f"{each.detector} {each.mean.mean.image_auroc * 100:.1f} %" for each in evaluations)
        parts.append(_picture(picture, "Figures of each set and detector; mean image AUROC: " + ", ".join(means)))
    for each in evaluations:
        parts += [_table(detection_table(each)), _table(speed_table(each))]
    return "\n".join([*parts, "</section>"])


def _section(section: Section, anchor: str) -> str:
    result = section.result
    rates = f"{result.false_reject_rate * 100:.1f} % false rejects, {result.detection_rate * 100:.1f} % detected"
    roc = f"ROC curve of {section.title}: image AUROC {result.image_auroc * 100:.2f} %; at the threshold {rates}"
    kinds = ", ".join(f"{kind.kind} {kind.rejected} of {kind.images} rejected" for kind in result.kinds)
    return "\n".join(
        [
            f'<section id="{anchor}"><h2>{escape(section.title)}</h2>',
            f"<p>Threshold {result.threshold:.4g}, {rates}. Curves and exhibits are those of seed {result.seed}; "
            f'scores of all test images: <a href="{quote(section.table)}">{escape(section.table)}</a></p>',
            '<div class="curves">',
            _picture(section.roc, roc),
            _picture(section.scores, f"Histograms of the scores of {section.title}: {kinds}"),
            "</div>",
            _table(_kind_table(result.kinds)),
            *(_group(group) for group in section.groups),
            "</section>",
        ]
    )


def _kind_table(kinds: Sequence[KindResult]) -> TextTable:
    rows = [["kind", "images", "rejected", "rejected %", "image AUROC %"]]
    for each in kinds:
        auroc = "-" if each.image_auroc is None else f"{each.image_auroc * 100:.2f}"
        share = f"{each.rejected / each.images * 100:.1f}"
        rows.append([each.kind, str(each.images), str(each.rejected), share, auroc])
    return TextTable("by kind", rows)


def _group(group: Group) -> str:
    count = len(group.exhibits) + group.left_out
    heading = f"<h3>{escape(group.title)} <small>{count}</small></h3>"
    if not count:
        return f'{heading}<p class="note">None.</p>'
    more = f"; {group.left_out} more left out" if group.left_out else ""
    note = f'<p class="note">{escape(group.order)}{more}</p>'
    return f'{heading}{note}<div class="wall {group.slug}">{"".join(map(_exhibit, group.exhibits))}</div>'


def _exhibit(exhibit: Exhibit) -> str:
    width, height = exhibit.size
    size = f'width="{width}" height="{height}" loading="lazy"'
    pictures = "".join(
        f'<a href="{quote(name)}"><img src="{quote(name)}" alt="{escape(alt)}" {size}></a>'
        for name, alt in ((exhibit.picture, exhibit.alt), (exhibit.heat, exhibit.heat_alt))
    )
    caption = f"<b>{exhibit.ratio:.2f} x threshold</b> {escape(exhibit.kind)} <span>{escape(exhibit.name)}</span>"
    return f'<figure class="exhibit"><div>{pictures}</div><figcaption>{caption}</figcaption></figure>'


def _table(table: TextTable) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.rows[0])
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows[1:]
    )
    caption = f"<caption>{escape(table.title)}</caption>"
    return f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{heads}</tr></thead>{rows}</table></div>'


def _picture(name: str, alt: str) -> str:
    return f'<img class="plot" src="{quote(name)}" alt="{escape(alt)}">'


def _legend() -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in _LEGEND)
    return f"<section><h2>What the words mean</h2><dl>{items}</dl></section>"


def _settings(evaluation: Evaluation) -> str:
    settings = {
        "detector": evaluation.detector,
        "detector_options": evaluation.detector_options,
        "teacher_sha256": evaluation.teacher_sha256,
        "settings": evaluation.settings.model_dump(mode="json"),
    }
    text = escape(json.dumps(settings, indent=2))
    return f"<details><summary>How {escape(evaluation.detector)} was trained</summary><pre>{text}</pre></details>"
