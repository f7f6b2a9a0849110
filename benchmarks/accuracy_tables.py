"""From the journal of `benchmarks.accuracy` to its document: means and spreads over seeds, per set and over sets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

FIGURES = ("image_auroc", "average_precision", "pixel_auroc", "aupro_30", "aupro_5")


def summarise(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document: one row for each suite, way, view and teacher.

    A row has, per set and for the mean over the sets, each figure's mean over seeds and sample standard deviation in
    per cent, and the number of seeds.

    Args:
        entries: Lines of the journal.
    """
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        for view in entry["views"]:
            groups[entry["suite"], entry["way"], view, entry["teacher"]].append(entry)
    rows = [_row(key, members) for key, members in groups.items()]
    settings = {f"{entry['suite']}/{entry['way']}": entry["settings"] for entry in entries}
    return {"benchmark": "accuracy", "unit": "per cent, mean and spread over seeds", "rows": rows, "settings": settings}


def joined(
    earlier: dict[str, Any], measured: dict[str, Any], ways: Mapping[tuple[str, str, str], str]
) -> dict[str, Any]:
    """Return a document of both: a row that was measured anew replaces the earlier one, unless it has less.

    Args:
        earlier: A document.
        measured: Another one.
        ways: The fingerprint of each (suite, way, teacher) as it is now; earlier rows of others are left out.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in (*earlier["rows"], *measured["rows"]):
        key = (*_place(row), row["view"])
        if ways.get(_place(row)) == row.get("fingerprint") and (key not in rows or _has_all_of(row, rows[key])):
            rows[key] = row
    names = {f"{suite}/{way}" for suite, way, _ in map(_place, rows.values())}
    settings = {name: each for name, each in (earlier["settings"] | measured["settings"]).items() if name in names}
    kept = sorted(rows.values(), key=lambda row: row["suite"])
    return measured | {"rows": kept, "settings": settings, "beside": earlier.get("beside", {})}


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["suite"], row["way"], row["teacher"]


def _has_all_of(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row has at least the other one's sets, each with as many seeds."""
    return all(row["sets"].get(name, {"seeds": 0})["seeds"] >= each["seeds"] for name, each in other["sets"].items())


def _row(key: tuple[str, str, str, str], members: list[dict[str, Any]]) -> dict[str, Any]:
    suite, way, view, teacher = key
    sets = sorted({entry["set"] for entry in members})
    row: dict[str, Any] = {"suite": suite, "way": way, "view": view, "teacher": teacher, "sets": {}}
    for name in sets:
        of_set = [entry for entry in members if entry["set"] == name]
        row["sets"][name] = {
            "seeds": len(of_set),
            "train_images": of_set[0]["train_images"],
            "train_seconds": round(statistics.mean(entry["train_seconds"] for entry in of_set), 1),
            **_spread([entry["views"][view] for entry in of_set]),
        }
    seeds = sorted({entry["seed"] for entry in members})
    by_seed = [[entry["views"][view] for entry in members if entry["seed"] == seed] for seed in seeds]
    whole = [of_seed for of_seed in by_seed if len(of_seed) == len(sets)]
    row["mean"] = {"seeds": len(whole), **_spread([_mean_of(of_seed) for of_seed in whole])} if whole else None
    row["parameters"] = members[0]["parameters"]
    row["fingerprint"] = members[0]["fingerprint"]
    return row


def _mean_of(of_seed: list[dict[str, float | None]]) -> dict[str, float]:
    """Return each figure's mean over the sets that have it."""
    found = {figure: [each[figure] for each in of_seed if each.get(figure) is not None] for figure in FIGURES}
    return {figure: statistics.mean(v for v in values if v is not None) for figure, values in found.items() if values}


def _spread(views: list[Any]) -> dict[str, list[float | None]]:
    result: dict[str, list[float | None]] = {}
    for figure in FIGURES:
        values = [view[figure] * 100 for view in views if view.get(figure) is not None]
        if values:
            spread = round(statistics.stdev(values), 2) if len(values) > 1 else None
            result[figure] = [round(statistics.mean(values), 2), spread]
    return result
