"""Results: the schema, segments that are there whole or not at all, and what is kept as evidence."""

import errno
import os
import resource
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from conftest import new_frame, texture

from producers.frame import Picture
from workers.errors import ResultsUnavailable
from workers.evidence import FAIL, PASS, UNKNOWN, dequantised, image_jpeg, is_kept, quantised
from workers.reading import read_results
from workers.results import HEAVY, MAP_SIZE, SCHEMA, Row, SegmentWriter, captured_at, filesystem
from workers.settings import EvidenceSettings

START = datetime(2026, 11, 23, 6, tzinfo=UTC)


def new_row(seq: int, product: str = "bolt", **changes) -> Row:
    """The row of a frame that was captured `seq` seconds after six o'clock."""
    row = Row(
        frame_id=f"{product}/cam-1/{seq}",
        product=product,
        camera="cam-1",
        seq=seq,
        captured_at=START + timedelta(seconds=seq),
        verdict="pass",
        score=0.25,
        threshold=0.5,
        model_version="20261123T014512-3fa9",
        detector="stfpm",
        reason=None,
        queue_ms=1.5,
        infer_ms=2.5,
        total_ms=5.0,
        replica="r",
    )
    return replace(row, **changes)


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "results")


@pytest.fixture
def writer(place):
    return SegmentWriter(place, "r")


def segments(place: str) -> list[str]:
    return sorted(os.listdir(f"{place}/segments"))


# --- the schema


def test_the_schema_is_the_published_one():
    assert [(field.name, str(field.type), field.nullable) for field in SCHEMA] == [
        ("frame_id", "string", False),
        ("product", "string", False),
        ("camera", "string", False),
        ("seq", "int64", False),
        ("captured_at", "timestamp[us, tz=UTC]", False),
        ("verdict", "string", False),
        ("score", "double", True),
        ("threshold", "double", True),
        ("model_version", "string", True),
        ("detector", "string", True),
        ("reason", "string", True),
        ("queue_ms", "double", False),
        ("infer_ms", "double", False),
        ("total_ms", "double", False),
        ("replica", "string", False),
        ("map_u8", "binary", True),
        ("map_min", "float", True),
        ("map_max", "float", True),
        ("image_jpeg", "binary", True),
    ]
    assert list(asdict(new_row(1))) == SCHEMA.names


def test_what_is_written_is_read_back(place, writer):
    full = new_row(1, map_u8=bytes(range(256)) * 16, map_min=0.5, map_max=1.5, image_jpeg=b"\xff\xd8...\xff\xd9")
    unknown = new_row(2, verdict="unknown", score=None, threshold=None, model_version=None, detector=None, reason="why")
    path = writer.write([full, unknown])
    assert os.path.dirname(path) == f"{place}/segments"
    table = read_results(place)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [asdict(full), asdict(unknown)]


def test_capture_times_are_exact_to_the_microsecond():
    at_ns = 1_795_400_914_123_456_789
    assert captured_at(at_ns) == datetime.fromtimestamp(1_795_400_914, UTC).replace(microsecond=123_456)
    assert captured_at(0) == datetime(1970, 1, 1, tzinfo=UTC)
    assert captured_at(2**63 - 1).year == 2262


def test_a_segment_is_a_plain_arrow_file(writer):
    path = writer.write([new_row(1)])
    assert pa.ipc.open_file(path).read_all().column("frame_id").to_pylist() == ["bolt/cam-1/1"]


# --- reading


def test_no_results_are_an_empty_table(place):
    assert read_results(place).num_rows == 0
    assert read_results(place).schema == SCHEMA
    SegmentWriter(place, "r")
    assert read_results(place, columns=["seq"]).schema.names == ["seq"]


def test_rows_come_in_the_order_of_their_capture(place, writer):
    for numbers in ([5, 3], [1], [4, 2]):
        writer.write([new_row(seq) for seq in numbers])
    assert read_results(place).column("seq").to_pylist() == [1, 2, 3, 4, 5]


def test_a_frame_judged_twice_is_read_once_and_as_judged_first(place, writer):
    writer.write([new_row(1, score=0.1), new_row(2, score=0.2)])
    SegmentWriter(place, "a replica before r by name").write([new_row(1, score=0.9), new_row(3, score=0.3)])
    assert read_results(place, columns=["seq", "score"]).to_pylist() == [
        {"seq": 1, "score": 0.1},
        {"seq": 2, "score": 0.2},
        {"seq": 3, "score": 0.3},
    ]


def test_rows_are_chosen_by_product_time_and_frame(place, writer):
    writer.write([*(new_row(seq) for seq in range(5)), *(new_row(seq, "nut") for seq in range(5))])
    assert read_results(place, product="nut", columns=["product"]).to_pylist() == [{"product": "nut"}] * 5
    assert set(read_results(place, since=START + timedelta(seconds=3)).column("seq").to_pylist()) == {3, 4}
    chosen = read_results(place, frame_ids=["nut/cam-1/2", "bolt/cam-1/0", "absent"], columns=["frame_id"])
    assert chosen.column("frame_id").to_pylist() == ["bolt/cam-1/0", "nut/cam-1/2"]
    assert read_results(place, product="absent").num_rows == read_results(place, frame_ids=[]).num_rows == 0
    both = read_results(place, product="nut", since=START + timedelta(seconds=4))
    assert both.column("frame_id").to_pylist() == ["nut/cam-1/4"]


def test_columns_come_as_they_are_asked_for(place, writer):
    writer.write([new_row(1, image_jpeg=b"x")])
    assert read_results(place, columns=["verdict", "seq"]).to_pylist() == [{"verdict": "pass", "seq": 1}]
    assert read_results(place, columns=HEAVY).to_pylist() == [{"map_u8": None, "image_jpeg": b"x"}]


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"no arrow file" * 100])
def test_a_corrupt_segment_is_named(place, writer, content):
    path = writer.write([new_row(1)])
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ResultsUnavailable, match=f"cannot read results in {place}: ") as caught:
        read_results(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plain", "with space", "ünïcode", "per%41cent", "hash#tag"])
def test_places_of_any_name(tmp_path, name):
    SegmentWriter(str(tmp_path / name), "r").write([new_row(1)])
    assert read_results(str(tmp_path / name)).num_rows == 1
    assert read_results((tmp_path / name).as_uri()).num_rows == 1
    assert os.listdir(tmp_path) == [name]


def test_places_that_cannot_be_are_one_line(tmp_path):
    with pytest.raises(ResultsUnavailable, match="cannot use ftp://nowhere/x for results: ") as caught:
        filesystem("ftp://nowhere/x")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsUnavailable, match=f"cannot write results to {tmp_path}/file"):
        SegmentWriter(str(tmp_path / "file"), "r")


# --- whole or not at all


def test_a_segment_is_seen_only_when_it_is_durable(place, writer, monkeypatch):
    writer.write([new_row(1)])
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((os.path.isfile(f"/proc/self/fd/{fd}"), rows(place))))
    writer.write([new_row(2)])
    # the file is synced while nobody sees it, the folder once the name is there
    assert seen == [(True, [1]), (False, [1, 2])]


def rows(place: str) -> list[int]:
    return read_results(place, columns=["seq"]).column("seq").to_pylist()


def test_what_a_crash_left_half_written_is_ignored(place, writer):
    writer.write([new_row(1)])
    name = segments(place)[0]
    Path(place, "segments", f".{name}.tmp").write_bytes(b"half")
    Path(place, "segments", "notes.txt").write_text("not a segment")
    assert rows(place) == [1]
    writer.write([new_row(2)])
    assert rows(place) == [1, 2]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_is_one_line_and_leaves_nothing(place, writer, monkeypatch, error):
    writer.write([new_row(1)])
    before = segments(place)

    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fail)
        with pytest.raises(ResultsUnavailable, match=f"cannot write results to {place}/segments: .*") as caught:
            writer.write([new_row(2)])
    assert os.strerror(error) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert segments(place) == before
    writer.write([new_row(2)])
    assert rows(place) == [1, 2]


def test_a_disk_that_takes_half_a_segment_keeps_none_of_it(place, writer):
    """A limit on the size of files fails a write midway, as a full disk does."""
    writer.write([new_row(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ResultsUnavailable, match=r"cannot write results to .*File too large$"):
            writer.write([new_row(2, image_jpeg=bytes(1_000_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(segments(place)) == 1
    writer.write([new_row(3)])
    assert rows(place) == [1, 3]


def test_a_folder_that_vanished_is_one_line(place, writer):
    os.rmdir(f"{place}/segments")
    with pytest.raises(ResultsUnavailable, match="No such file or directory"):
        writer.write([new_row(1)])


def test_two_replicas_writing_at_one_moment_do_not_meet(place, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    for name in ("a", "b"):
        writer = SegmentWriter(place, name)
        writer.write([new_row(1)])
        writer.write([new_row(2)])
    assert len(segments(place)) == 4


# --- evidence

NEAR = EvidenceSettings(near=0.1, pass_share=0.0)


@pytest.mark.parametrize(
    ("verdict", "score", "kept"),
    [
        (FAIL, 2.0, True),
        (UNKNOWN, 0.0, True),
        (PASS, 1.0, True),
        (PASS, 0.95, True),
        (PASS, 0.85, False),
        (PASS, 0.0, False),
    ],
)
def test_fails_unknowns_and_near_passes_are_kept(verdict, score, kept):
    assert is_kept(new_frame(), verdict, score, 1.0, NEAR) is kept


def test_a_share_of_the_other_passes_is_kept_by_name():
    frames = [new_frame(seq) for seq in range(4000)]
    sampled = EvidenceSettings(near=0.0, pass_share=0.1)
    kept = [is_kept(frame, PASS, 0.1, 1.0, sampled) for frame in frames]
    assert kept == [is_kept(new_frame(seq), PASS, 0.1, 1.0, sampled) for seq in range(4000)]
    assert 0.08 < sum(kept) / 4000 < 0.12
    assert all(is_kept(frame, PASS, 0.1, 1.0, EvidenceSettings(pass_share=1.0)) for frame in frames)
    assert not any(is_kept(frame, PASS, 0.1, 1.0, EvidenceSettings(pass_share=0.0)) for frame in frames)


@pytest.mark.parametrize("size", [64, 96, 128, 200, 256])
def test_a_kept_map_is_the_map_to_half_a_level(size):
    anomaly_map = np.random.default_rng(size).gamma(1.0, 0.3, (size, size)).astype(np.float32)
    small = cv2.resize(anomaly_map, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA)
    map_u8, low, high = quantised(anomaly_map)
    assert len(map_u8) == MAP_SIZE * MAP_SIZE
    assert (low, high) == (small.min(), small.max())
    restored = dequantised(map_u8, low, high)
    assert np.abs(restored - small).max() <= (high - low) / 255 / 2 * 1.001
    assert np.unravel_index(restored.argmax(), restored.shape) == np.unravel_index(small.argmax(), small.shape)


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_a_flat_map_is_kept_too(value):
    restored = dequantised(*quantised(np.full((64, 64), value, np.float32)))
    np.testing.assert_allclose(restored, value, rtol=1e-6)


def test_a_jpeg_is_kept_as_it_came_and_others_are_coded():
    image = texture(4)
    jpeg = Picture.encode(image)
    assert image_jpeg(jpeg, jpeg.decode()) is jpeg.data
    assert image_jpeg(replace(jpeg, codec="png"), jpeg.decode()) is jpeg.data  # a file with another's name
    for codec in ("png", "raw"):
        kept = image_jpeg(Picture.encode(image, codec), image)
        np.testing.assert_allclose(Picture("jpeg", (48, 64, 3), kept).decode().astype(int), image, atol=12)
    mislabelled = Picture("jpeg", (48, 64, 3), Picture.encode(image, "png").data)
    assert image_jpeg(mislabelled, image).startswith(b"\xff\xd8")


def test_an_image_that_no_jpeg_holds_is_not_kept():
    line_scan = np.zeros((70_000, 4, 3), np.uint8)
    assert image_jpeg(Picture.encode(line_scan, "raw"), line_scan) is None
