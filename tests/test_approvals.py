"""Approvals: a person's word, kept with the image."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import texture
from test_results import new_row

from producers.errors import FrameError
from producers.frame import Picture
from workers.approvals import Approvals
from workers.errors import JobError, ResultsUnavailable
from workers.results import SegmentWriter

IMAGES = {seq: Picture.encode(texture(seq)).data for seq in range(1, 4)}


@pytest.fixture
def approvals(tmp_path):
    """Approvals of four frames with results; of the fourth no image was kept."""
    rows = [new_row(seq, verdict="fail", score=0.9, image_jpeg=image) for seq, image in IMAGES.items()]
    SegmentWriter(str(tmp_path / "results"), "r").write([*rows, new_row(4)])
    return Approvals(str(tmp_path / "datasets"), str(tmp_path / "results"))


def test_an_approval_keeps_image_person_and_what_was_said(approvals, tmp_path):
    (approval,) = approvals.approve(["bolt/cam-1/2"], "normal", "ann")
    assert approval.image == "bolt/approved/cam-1-2.jpg"
    assert approvals.image(approval) == IMAGES[2] == Path(tmp_path, "datasets", approval.image).read_bytes()
    recorded = json.loads(Path(tmp_path, "datasets/bolt/approved/cam-1-2.json").read_text())
    assert (recorded["frame_id"], recorded["label"], recorded["by"]) == ("bolt/cam-1/2", "normal", "ann")
    assert (recorded["verdict"], recorded["score"]) == ("fail", 0.9)
    assert recorded["model_version"] == "20261123T014512-3fa9"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(recorded["at"])).total_seconds()) < 60
    assert approvals.of("bolt") == [approval]


def test_approvals_are_of_one_product_and_one_label(approvals):
    approvals.approve(["bolt/cam-1/3", "bolt/cam-1/1", "bolt/cam-1/3"], "normal", "ann")
    approvals.approve(["bolt/cam-1/2"], "defect", "bob")
    assert [each.frame_id for each in approvals.of("bolt")] == ["bolt/cam-1/1", "bolt/cam-1/3"]
    assert [(each.frame_id, each.by) for each in approvals.of("bolt", "defect")] == [("bolt/cam-1/2", "bob")]
    assert approvals.of("nut") == []


def test_the_last_word_counts(approvals):
    approvals.approve(["bolt/cam-1/1"], "normal", "ann")
    approvals.approve(["bolt/cam-1/1"], "defect", "bob")
    assert approvals.of("bolt") == []
    assert [each.by for each in approvals.of("bolt", "defect")] == ["bob"]


@pytest.mark.parametrize(
    ("frame_id", "message"),
    [
        ("bolt/cam-1/99", "no result for frame bolt/cam-1/99; `proctor results` lists them"),
        ("nonsense", "no result for frame nonsense"),
        ("bolt/cam-1/4", "no image was kept of frame bolt/cam-1/4"),
    ],
)
def test_one_frame_that_cannot_be_approved_leaves_all_alone(approvals, frame_id, message):
    with pytest.raises(JobError, match=message) as caught:
        approvals.approve(["bolt/cam-1/1", frame_id], "normal", "ann")
    assert "\n" not in str(caught.value)
    assert approvals.of("bolt") == []


def test_an_approval_whose_record_is_missing_does_not_count(approvals, tmp_path):
    approvals.approve(["bolt/cam-1/1", "bolt/cam-1/2"], "normal", "ann")
    Path(tmp_path, "datasets/bolt/approved/cam-1-1.json").unlink()  # as if it had crashed before the record
    Path(tmp_path, "datasets/bolt/approved/cam-1-3.json.tmp").write_text("{")
    assert [each.frame_id for each in approvals.of("bolt")] == ["bolt/cam-1/2"]


@pytest.mark.parametrize("content", ["", "{", '{"frame_id": 3}'])
def test_an_unreadable_record_is_named(approvals, tmp_path, content):
    approvals.approve(["bolt/cam-1/1"], "normal", "ann")
    Path(tmp_path, "datasets/bolt/approved/cam-1-1.json").write_text(content)
    with pytest.raises(JobError, match=r"the approval .*/bolt/approved/cam-1-1\.json is not readable"):
        approvals.of("bolt")


def test_a_missing_image_is_named(approvals, tmp_path):
    (approval,) = approvals.approve(["bolt/cam-1/1"], "normal", "ann")
    Path(tmp_path, "datasets", approval.image).unlink()
    with pytest.raises(JobError, match="the image of approval bolt/cam-1/1 is not readable"):
        approvals.image(approval)


def test_a_place_that_cannot_be_written_is_one_line(approvals, tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "bolt").write_text("a file")
    with pytest.raises(JobError, match="cannot record the approval of bolt/cam-1/1: ") as caught:
        approvals.approve(["bolt/cam-1/1"], "normal", "ann")
    assert "\n" not in str(caught.value)


def test_products_that_cannot_be_and_places_that_cannot_be(approvals, tmp_path):
    with pytest.raises(FrameError, match="is not a valid name"):
        approvals.of("../results")
    with pytest.raises(ResultsUnavailable, match="cannot use"):
        Approvals("ftp://nowhere/x", str(tmp_path))


def test_a_frame_of_a_camera_with_dots_and_dashes(tmp_path):
    row = replace(new_row(7), frame_id="bolt/a.b-1/7", camera="a.b-1", image_jpeg=IMAGES[1])
    SegmentWriter(str(tmp_path / "results"), "r").write([row])
    approvals = Approvals(str(tmp_path / "datasets"), str(tmp_path / "results"))
    (approval,) = approvals.approve(["bolt/a.b-1/7"], "normal", "ann")
    assert approvals.image(approval) == IMAGES[1]
