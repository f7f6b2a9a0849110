"""Writes the measured tables into `docs/detectors.md` and draws `docs/pictures/accuracy.svg`.

    python docs/make_detector_figures.py

It reads what `benchmarks.accuracy` wrote, `benchmarks/results/accuracy.json`, and where they are there the documents
of `benchmarks.peers` and `benchmarks.memory_bank`, `peers*.json` and `memory_bank*.json` in the same folder. Text
between `<!-- figures: NAME -->` and `<!-- end -->` is replaced; a marker without figures is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE, PICTURE = DOCS / "detectors.md", DOCS / "pictures" / "accuracy.svg"
ACCURACY = DOCS.parent / "benchmarks" / "results" / "accuracy.json"
# What a marker stands for: suites of `benchmarks.accuracy`.
MARKERS = {"table": ("table",), "asymts": ("asymts",), "fcl": ("fcl",), "accurate": ("recommended", "paper")}
FIGURES = {"pixel_auroc": "pixel AUROC", "aupro_30": "AUPRO 30 %"}
LONG = 30  # rows; a longer table is folded
SPEEDS = {"frames_per_s": "", "frames_per_s_openvino": ", OpenVINO"}

Row = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, folded where it is long."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    text = "\n".join(lines)
    return f"<details>\n<summary>{len(rows)} rows</summary>\n\n{text}\n\n</details>" if len(rows) > LONG else text


def figure(found: Sequence[float] | None) -> str:
    """Return 'mean ± spread', or a dash where nothing was measured."""
    if not found:
        return "-"
    return f"{found[0]:.1f}" + ("" if found[1] is None else f" ± {found[1]:.1f}")


def of_suites(rows: Sequence[Row], suites: Sequence[str]) -> str | None:
    """Return the table of some suites: image AUROC by set and on average, then the average figures of pixels."""
    chosen = [row for row in rows if row["suite"] in suites]
    if not chosen:
        return None
    sets = sorted({name for row in chosen for name in row["sets"]})
    masked = [key for key in FIGURES if any(key in each for row in chosen for each in row["sets"].values())]
    head = [
        "training",
        "judged by",
        "teacher",
        *sets,
        "mean",
        *(FIGURES[key] for key in masked),
        "parameters",
        "train s",
    ]
    lines = []
    for row in chosen:
        mean = row["mean"] or {}
        of_sets = [row["sets"].get(name, {}) for name in sets]
        seconds = statistics.mean(each["train_seconds"] for each in row["sets"].values())
        name = row["way"] if len(suites) == 1 or row["suite"] == row["way"] else f"{row['suite']}: {row['way']}"
        lines.append(
            [name, row["view"] or "as trained", f"`{row['teacher']}`"]
            + [figure(each.get("image_auroc")) for each in of_sets]
            + [figure(mean.get(key)) for key in ("image_auroc", *masked)]
            + [f"{row['parameters'] / 1e6:.2f} M", f"{seconds:.0f}"]
        )
    if all(line[1] == "as trained" for line in lines):
        head, lines = [head[0], *head[2:]], [[line[0], *line[2:]] for line in lines]
    seeds = sorted({each["seeds"] for row in chosen for each in row["sets"].values()})
    spans = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    note = (
        f"Image AUROC by set, per cent: mean ± sample standard deviation over {spans} seeds; pixels: sets with masks."
    )
    return f"{note}\n\n{table(head, lines)}"


def of_peers(folder: Path) -> str | None:
    """Return the tables of `peers*.json` and `memory_bank*.json`."""
    parts = [_peers(json.loads(path.read_text())) for path in sorted(folder.glob("peers*.json"))]
    parts += [_bank(json.loads(path.read_text())) for path in sorted(folder.glob("memory_bank*.json"))]
    return "\n\n".join(parts) or None


def _peers(document: dict[str, Any]) -> str:
    speeds: list[tuple[str, str, dict[str, float]]] = []
    for name, each in document["proctor"]["detectors"].items():
        before, after = each["frames_per_s_before"], each["frames_per_s_after"]
        speeds.append((f"Proctor, {name}", "-", {size: min(before[size], after[size]) for size in before}))
    results = {}
    for result in document["anomalib"]["results"]:
        for key, way in SPEEDS.items():
            if key in result:
                speeds.append((f"anomalib, {result['method']}{way}", result["name"], result[key]))
                results[speeds[-1][:2]] = result
    sizes = sorted(speeds[0][2], key=int)
    lines = [
        [name, each, _budget(results.get((name, each), {})), *_shares(results.get((name, each), {}))]
        + [f"{fps[size]:.1f}" for size in sizes]
        for name, each, fps in speeds
    ]
    head = ["method", "set", "budget", *_FIGURE_HEAD, *(f"frames/s, batch of {size}" for size in sizes)]
    where = f"device {document['device']}, CPU threads {document['threads']}"
    return f"Input {document['input']}; {where}.\n\n{table(head, lines)}"


def _budget(result: dict[str, Any]) -> str:
    """Return what the peer's training was cut to."""
    if "steps" in result:
        return f"{result['steps']:,} of {result['published_steps']:,} steps"
    return f"{result['train_images']} images" if result else "-"


def _bank(document: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in document["results"]:
        groups[result["name"]].append(result)
    lines = [
        [name, str(len(of_set)), str(of_set[0]["train_images"]), *_shares(*of_set), f"{of_set[0]['bank_vectors']:,}"]
        for name, of_set in groups.items()
    ]
    head = ["set", "seeds", "training images", *_FIGURE_HEAD, "vectors kept"]
    size = document["settings"]["size"]
    return f"Memory bank (PatchCore), teacher `{document['teacher']}`, input {size}x{size}.\n\n{table(head, lines)}"


_FIGURE_HEAD = ["image AUROC", *FIGURES.values()]


def _shares(*results: dict[str, Any]) -> list[str]:
    """Return each figure in per cent over results, with a spread where there is more than one."""
    cells = []
    for key in ("image_auroc", *FIGURES):
        values = [100 * result[key] for result in results if result.get(key) is not None]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
    return cells


def draw(rows: Sequence[Row], picture: Path) -> None:
    """Draw bars of image AUROC by detector and set, a panel for each teacher, with the spread over seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "proctor", "font.size": 8})
    from matplotlib import pyplot as plt

    teachers = sorted({row["teacher"] for row in rows})
    sets = sorted({name for row in rows for name in row["sets"]})
    shape = {"figsize": (8.2, 2.6 * len(teachers)), "squeeze": False, "sharex": True, "layout": "constrained"}
    figures, panels = plt.subplots(len(teachers), 1, **shape)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lowest = min(each["image_auroc"][0] - each["image_auroc"][1] for row in rows for each in row["sets"].values())
    width = 0.8 / len(sets)
    for panel, teacher in zip(panels[:, 0], teachers, strict=True):
        for place, name in enumerate(sets):
            bars = [
                (row["way"], row["sets"][name]) for row in rows if row["teacher"] == teacher and name in row["sets"]
            ]
            at = [ways.index(way) + (place - (len(sets) - 1) / 2) * width for way, _ in bars]
            means, spreads = ([each["image_auroc"][part] for _, each in bars] for part in (0, 1))
            panel.bar(at, means, width, yerr=spreads, capsize=2, label=name, error_kw={"lw": 0.8})
        panel.set(title=f"teacher {teacher}", ylabel="image AUROC, %", ylim=(max(0, lowest // 5 * 5 - 5), 100.5))
        panel.set_xticks(range(len(ways)), ways)
        panel.grid(axis="y", lw=0.4)
        panel.set_axisbelow(True)
    figures.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sets))
    figures.savefig(picture, metadata={"Date": None, "Creator": None})


def insert(page: str, name: str, text: str) -> str:
    """Return the page with the text between a marker and its end replaced; without the marker it is an error."""
    marked = re.compile(rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(page):
        raise SystemExit(f"no marker for {name}")
    return marked.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, count=1)


def main() -> None:
    """Write tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", type=Path, default=ACCURACY)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    rows = json.loads(arguments.accuracy.read_text())["rows"]
    texts = {name: of_suites(rows, suites) for name, suites in MARKERS.items()}
    texts["peers"] = of_peers(arguments.accuracy.parent)
    if texts["table"]:
        draw([row for row in rows if row["suite"] == "table" and not row["view"]], arguments.picture)
        picture = f"{arguments.picture.parent.name}/{arguments.picture.name}"
        texts["table"] = f"![Image AUROC by detector, set and teacher]({picture})\n\n{texts['table']}"
    page = arguments.page.read_text(encoding="utf-8")
    for name, text in texts.items():
        page = insert(page, name, text) if text else page
    arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
