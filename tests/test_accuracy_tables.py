"""A method that is measured anew takes its old rows' place in the document of accuracy, and no other's."""

import pytest

from benchmarks.accuracy_suites import Way
from benchmarks.accuracy_tables import joined, summarise
from models.detectors import DETECTORS
from models.settings import TrainingSettings

WAYS = {("table", "stfpm", "lite0"): "aa", ("table", "stfpm", "resnet18"): "aa", ("fcl", "host", "lite0"): "bb"}


def row(suite: str, way: str, teacher: str, auroc: float, view: str = "", fingerprint: str = "aa", **sets: int) -> dict:
    """A row with so many seeds of each set."""
    return {
        "suite": suite,
        "way": way,
        "teacher": teacher,
        "view": view,
        "fingerprint": fingerprint,
        "sets": {name: {"seeds": seeds} for name, seeds in (sets or {"a": 3}).items()},
        "mean": {"image_auroc": [auroc, 0.1]},
    }


def aurocs(document: dict) -> list[tuple]:
    return [(each["suite"], each["teacher"], each["mean"]["image_auroc"][0]) for each in document["rows"]]


def test_new_rows_replace_those_of_their_way_view_and_teacher_and_others_stay():
    earlier = {
        "rows": [row("table", "stfpm", "lite0", 90.0), row("table", "stfpm", "resnet18", 86.0)],
        "settings": {"table/stfpm": {"steps": 100}},
        "beside": {"speed": 1},
    }
    measured = {
        "rows": [row("table", "stfpm", "lite0", 92.0), row("fcl", "host", "lite0", 93.0, fingerprint="bb")],
        "settings": {"fcl/host": {"steps": 200}},
    }
    document = joined(earlier, measured, WAYS)
    assert aurocs(document) == [("fcl", "lite0", 93.0), ("table", "lite0", 92.0), ("table", "resnet18", 86.0)]
    assert document["settings"] == {"table/stfpm": {"steps": 100}, "fcl/host": {"steps": 200}}
    assert document["beside"] == {"speed": 1}


@pytest.mark.parametrize(
    ("sets", "kept"),
    [({"a": 3, "b": 3}, 92.0), ({"a": 5, "b": 3, "c": 1}, 92.0), ({"a": 1, "b": 3}, 90.0), ({"a": 9}, 90.0)],
)
def test_a_row_with_fewer_seeds_or_sets_does_not_replace_one(sets, kept):
    earlier = {"rows": [row("table", "stfpm", "lite0", 90.0, a=3, b=3)], "settings": {}}
    measured = {"rows": [row("table", "stfpm", "lite0", 92.0, **sets)], "settings": {}}
    assert aurocs(joined(earlier, measured, WAYS)) == [("table", "lite0", kept)]


@pytest.mark.parametrize("old", [row("table", "old", "lite0", 90.0), row("table", "stfpm", "lite0", 90.0, "", "cc")])
def test_ways_that_are_gone_or_changed_are_left_out_with_their_settings(old):
    earlier = {"rows": [old], "settings": {f"table/{old['way']}": {}}}
    assert joined(earlier, {"rows": [], "settings": {}}, WAYS) == {"rows": [], "settings": {}, "beside": {}}


def test_a_way_is_another_one_when_a_default_or_the_method_changes(monkeypatch):
    way = Way("table", "plain", TrainingSettings(detector="stfpm", detector_options={}))
    before = way.fingerprint
    spelled_out = TrainingSettings(detector="stfpm", detector_options=way.described["detector_options"])
    assert Way("table", "plain", spelled_out).fingerprint == before
    field = DETECTORS["stfpm"].model_fields["width"]
    monkeypatch.setattr(DETECTORS["stfpm"], "revision", 99)
    assert way.described["detector_options"]["width"] == field.default
    assert way.described["revision"] == 99
    assert way.fingerprint != before


def test_a_summary_says_what_its_rows_were_measured_with():
    entry = {
        "suite": "table",
        "way": "stfpm",
        "teacher": "lite0",
        "fingerprint": "aa",
        "set": "a",
        "train_images": 4,
        "train_seconds": 1.0,
        "parameters": 7,
        "settings": {"steps": 100},
    }
    entries = [entry | {"seed": seed, "views": {"": {"image_auroc": value}}} for seed, value in ((0, 0.9), (1, 0.92))]
    document = summarise(entries)
    (found,) = document["rows"]
    assert (found["fingerprint"], found["sets"]["a"]["seeds"]) == ("aa", 2)
    assert found["mean"]["image_auroc"] == [91.0, pytest.approx(1.41)]
    assert document["settings"] == {"table/stfpm": {"steps": 100}}
