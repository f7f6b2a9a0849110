"""A method that is measured anew takes its old rows' place in the document of accuracy, and no other's."""

from benchmarks.accuracy_tables import joined

WAYS = {("table", "stfpm", "lite0"), ("table", "stfpm", "resnet18"), ("fcl", "host", "lite0")}


def row(suite: str, way: str, teacher: str, auroc: float, view: str = "") -> dict:
    return {"suite": suite, "way": way, "teacher": teacher, "view": view, "mean": {"image_auroc": [auroc, 0.1]}}


def test_new_rows_replace_all_views_of_their_way_and_teacher_and_others_stay():
    earlier = {
        "rows": [
            row("table", "stfpm", "lite0", 90.0),
            row("table", "stfpm", "lite0", 91.0, "smoothed"),
            row("table", "stfpm", "resnet18", 86.0),
        ],
        "settings": {"table/stfpm": {"steps": 100}},
    }
    measured = {
        "rows": [row("table", "stfpm", "lite0", 92.0), row("fcl", "host", "lite0", 93.0)],
        "settings": {"fcl/host": {"steps": 200}},
    }
    document = joined(earlier, measured, WAYS)
    found = [(each["suite"], each["teacher"], each["mean"]["image_auroc"][0]) for each in document["rows"]]
    assert found == [("fcl", "lite0", 93.0), ("table", "resnet18", 86.0), ("table", "lite0", 92.0)]
    assert document["settings"] == {"table/stfpm": {"steps": 100}, "fcl/host": {"steps": 200}}


def test_ways_that_are_gone_are_left_out_with_their_settings():
    earlier = {"rows": [row("table", "old", "lite0", 90.0)], "settings": {"table/old": {}}}
    assert joined(earlier, {"rows": [], "settings": {}}, WAYS) == {"rows": [], "settings": {}}
