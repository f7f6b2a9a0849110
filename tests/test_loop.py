"""The loop: every frame one row, a verdict first, acknowledged last, whatever fails in between."""

import gc
import itertools
import math
import queue
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import new_frame, texture, wire, with_student
from memory_stream import MemoryServer, MemoryStream

from producers.frame import Frame, Picture
from workers import loop as loop_module
from workers import recording as recording_module
from workers.decoding import Decoded
from workers.engine import Engine, Judgement, Request, Resident
from workers.errors import DeviceFault, ResultsUnavailable, StreamUnavailable
from workers.evidence import dequantised, quantised
from workers.loop import InspectionLoop
from workers.reading import read_results
from workers.residency import Residency
from workers.results import Row, SegmentWriter
from workers.settings import EvidenceSettings, WorkerSettings

SETTINGS = WorkerSettings(
    device="cpu",
    max_batch=4,
    batch_wait_ms=0.0,
    segment_ms=0.0,
    claim_idle_ms=100,
    evidence=EvidenceSettings(pass_share=0.0),
)


FRAMES = [new_frame(seq, product) for seq, product in enumerate(["bolt", "nut"] * 8, start=1)]


class FixedPointers:
    """Pointers that nobody moves."""

    def __init__(self, current: dict[str, str]) -> None:
        self._current = current
        self.looked_up: list[str] = []

    def current(self) -> dict[str, str]:
        return self._current

    def of(self, product: str) -> dict[str, str]:
        self.looked_up.append(product)
        return {"current": self._current[product]} if product in self._current else {}


class JournallingWriter(SegmentWriter):
    """Writes segments and says so in the server's journal."""

    def __init__(self, uri: str, replica: str, journal: list[tuple[str, int]]) -> None:
        super().__init__(uri, replica)
        self._journal = journal

    def write(self, rows: list[Row]) -> str:
        path = super().write(rows)
        self._journal += [("write", row.seq) for row in rows]
        return path


@dataclass
class Line:
    """A loop with everything around it."""

    engine: Engine
    place: str
    settings: WorkerSettings = SETTINGS
    server: MemoryServer = field(default_factory=MemoryServer)
    pointers: FixedPointers = field(default_factory=lambda: FixedPointers({}))

    def __post_init__(self) -> None:
        self.stream = MemoryStream(self.server)
        self.residency = Residency(self.engine, self.pointers, poll_s=3600.0)
        self.writer = JournallingWriter(self.place, "r", self.server.journal)
        self.loop = self.new_loop(self.settings)

    def new_loop(self, settings: WorkerSettings) -> InspectionLoop:
        return InspectionLoop(self.stream, self.engine, self.residency, self.writer, settings, replica="r")

    def run(self, *frames: Frame) -> list[dict]:
        """Add frames, tick until all are settled, and return their rows."""
        self.server.add(frames)
        self.tick_until(lambda: not self.server.entries)
        return self.rows()

    def tick_until(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if done():
                return
            try:
                self.loop.tick()
            except StreamUnavailable:
                continue
        pytest.fail("the loop does not come to an end")

    def rows(self) -> list[dict]:
        return read_results(self.place).to_pylist()


@pytest.fixture
def line(engine, tmp_path):
    made = Line(engine, str(tmp_path / "results"))
    yield made
    made.loop.drain()


def judged_alone(engine: Engine, resident: Resident, frame: Frame) -> float:
    return engine.judge([Request(resident, frame.picture.decode())])[0].score


def assert_each_once(line: Line, frames: list[Frame]) -> None:
    """Every frame has one row, counts once in the ledger and has had its verdict."""
    assert Counter(row["frame_id"] for row in line.rows()) == Counter(frame.frame_id for frame in frames)
    assert line.server.judged == line.server.captured
    assert line.server.balanced
    assert {(verdict.product, verdict.seq) for verdict in line.server.verdicts} == {
        (frame.product, frame.seq) for frame in frames
    }


# --- in time and late


def test_a_late_frame_keeps_its_score_beside_the_verdict_that_went_out(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"), SETTINGS.model_copy(update={"takt_ms": 250.0}))
    late, other = new_frame(1, product="nut"), new_frame(2, product="nut")
    line.server.late.add(late.frame_id)
    first, second = line.run(late, other)
    assert (first["verdict"], first["reason"]) == ("unknown", "late: no verdict within 250 ms")
    assert first["score"] is not None
    assert (second["verdict"], second["reason"]) == ("fail", None)
    assert [verdict.seq for verdict in line.server.verdicts] == [2]  # the late one had its verdict
    assert line.server.balanced
    line.loop.drain()


def test_a_late_verdict_survives_a_lost_connection(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"))
    frame = new_frame(1, product="nut")
    line.server.late.add(frame.frame_id)
    line.stream.fail_at, line.stream.executed = ("send_verdicts", 1), True  # the reply is lost
    (row,) = line.run(frame)
    assert (row["verdict"], row["reason"]) == ("unknown", "late")
    line.loop.drain()


def test_a_batch_closes_early_for_a_frame_that_is_due(engine, tmp_path):
    patient = SETTINGS.model_copy(update={"batch_wait_ms": 3.6e6, "takt_ms": 50.0})
    line = Line(engine, str(tmp_path / "results"), patient)
    (row,) = line.run(new_frame(1))  # which without a takt would wait for an hour
    assert row["verdict"] == "pass"
    line.loop.drain()


# --- what becomes of a frame


def test_every_frame_gets_its_own_products_verdict_and_one_row(line, versions, residents):
    products = ["bolt", "nut", "washer", "nut", "bolt"] * 4
    codecs = ["jpeg", "png", "raw"] * 7
    frames = [
        new_frame(seq, product, picture=Picture.encode(texture(seq), codec))
        for seq, (product, codec) in enumerate(zip(products, codecs, strict=False), start=1)
    ]
    rows = {row["frame_id"]: row for row in line.run(*frames)}
    assert_each_once(line, frames)
    messages = {verdict.seq: verdict for verdict in line.server.verdicts}
    for frame in frames:
        row, message, card = rows[frame.frame_id], messages[frame.seq], getattr(versions, frame.product)
        assert row["score"] == pytest.approx(judged_alone(line.engine, residents[frame.product], frame), rel=1e-4)
        assert row["verdict"] == message.verdict == ("pass" if frame.product == "bolt" else "fail")
        assert (row["model_version"], row["threshold"], row["detector"]) == (card.version, card.threshold, "stfpm")
        assert (row["product"], row["camera"], row["seq"], row["replica"]) == (frame.product, "cam-1", frame.seq, "r")
        assert (message.score, message.threshold) == (row["score"], row["threshold"])
        assert (message.model_version, message.reason, row["reason"]) == (card.version, "", None)
        assert row["captured_at"].timestamp() == pytest.approx(frame.captured_at_ns / 1e9, abs=1e-5)
        assert 0 <= row["queue_ms"] <= row["total_ms"]
        assert 0 < row["infer_ms"] <= row["total_ms"]
        assert message.total_ms == row["total_ms"]
    assert line.loop.judged == len(frames)


def test_the_verdict_goes_first_and_the_entry_is_acknowledged_after_the_write(line):
    frames = [new_frame(seq) for seq in range(1, 14)]
    line.run(*frames)
    for frame in frames:
        assert [what for what, seq in line.server.journal if seq == frame.seq] == ["verdict", "write", "settle"]


def test_rows_are_written_together(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"), SETTINGS.model_copy(update={"segment_rows": 8, "segment_ms": 6e4}))
    line.server.add(new_frame(seq) for seq in range(1, 17))
    line.tick_until(lambda: not line.server.entries)
    assert len(list(Path(line.place, "segments").iterdir())) == 2
    line.loop.drain()


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (Picture("jpeg", (48, 64, 3), b""), "the image is empty (0 bytes)"),
        (Picture("jpeg", (48, 64, 3), Picture.encode(texture(1)).data[:900]), "corrupt jpeg data (900 bytes)"),
        (Picture("png", (1, 1, 3), Picture.encode(texture(1), "png").data), "declared as shape 1,1,3"),
        (Picture("raw", (10_000, 10_000, 3), b"x"), "100 megapixels, more than the 64 allowed"),
    ],
)
def test_an_unreadable_frame_is_unknown_and_its_neighbours_are_judged(line, residents, picture, reason):
    frames = [new_frame(1), new_frame(2, picture=picture), new_frame(3, product="nut")]
    before, bad, after = line.run(*frames)
    assert (bad["verdict"], bad["score"], bad["threshold"], bad["model_version"]) == ("unknown", None, None, None)
    assert reason in bad["reason"]
    assert "\n" not in bad["reason"]
    assert (bad["map_u8"], bad["image_jpeg"]) == (None, None)
    assert before["score"] == pytest.approx(judged_alone(line.engine, residents["bolt"], frames[0]), rel=1e-5)
    assert after["score"] == pytest.approx(judged_alone(line.engine, residents["nut"], frames[2]), rel=1e-5)
    assert_each_once(line, frames)
    message = line.server.verdicts[1]
    assert (message.verdict, message.reason, math.isnan(message.score)) == ("unknown", bad["reason"], True)


def test_a_product_without_model_is_unknown(line):
    frames = [new_frame(seq, product="mystery") for seq in range(1, 4)]
    for row in line.run(new_frame(9), *frames):
        if row["product"] == "mystery":
            assert (row["verdict"], row["reason"]) == ("unknown", "no model for this product")
            assert row["image_jpeg"] is not None  # somebody may look at it later
        else:
            assert row["verdict"] == "pass"
    assert line.pointers.looked_up == ["mystery"]  # once a batch, not once a frame


def test_a_product_whose_version_cannot_be_loaded_is_unknown_with_the_reason(engine, versions, tmp_path):
    broken = FixedPointers({"screw": "20261123T014512-3fa9"})
    line = Line(engine, str(tmp_path / "results"), pointers=broken)
    bad, good = line.run(new_frame(1, product="screw"), new_frame(2, product="nut"))
    assert bad["verdict"] == "unknown"
    assert bad["reason"].startswith("version 20261123T014512-3fa9 cannot be loaded: ")
    assert good["verdict"] == "fail"
    line.loop.drain()


def test_a_version_that_was_just_promoted_is_loaded_for_its_first_frame(registry, versions, tmp_path):
    engine = Engine(registry, "cpu", dtype=torch.float32)
    line = Line(engine, str(tmp_path / "results"), pointers=FixedPointers({"bolt": versions.bolt.version}))
    (row,) = line.run(new_frame(1))
    assert (row["verdict"], row["model_version"]) == ("pass", versions.bolt.version)
    line.loop.drain()


class Failing(torch.nn.Module):
    """A student whose network does not work."""

    def forward(self, images, features):
        raise RuntimeError("out of order\nand a second line")


def test_a_failing_network_is_unknown_for_its_frames_only(line, residents):
    line.engine.install(with_student(residents["nut"], Failing()))
    frames = [new_frame(1), new_frame(2, product="nut"), new_frame(3), new_frame(4, product="washer")]
    rows = line.run(*frames)
    assert [row["verdict"] for row in rows] == ["pass", "unknown", "pass", "fail"]
    assert rows[1]["reason"] == "the engine failed: RuntimeError: out of order"
    assert (rows[1]["score"], rows[1]["infer_ms"]) == (None, 0.0)
    for frame, row in zip(frames, rows, strict=True):
        if frame.product != "nut":
            assert row["score"] == pytest.approx(judged_alone(line.engine, residents[frame.product], frame), rel=1e-5)
    assert_each_once(line, frames)


@pytest.mark.parametrize("in_which_call", [1, 2], ids=["with the batch", "frame by frame"])
def test_a_broken_device_ends_the_loop_and_leaves_its_frames_to_another(line, monkeypatch, in_which_call):
    calls = []

    def judge(requests):
        calls.append(len(requests))
        raise DeviceFault("cuda:0 is broken") if len(calls) == in_which_call else ArithmeticError("first of all")

    monkeypatch.setattr(line.engine, "judge", judge)
    frames = [new_frame(1), new_frame(2)]
    with pytest.raises(DeviceFault, match="cuda:0 is broken"):
        line.run(*frames)
    assert (len(line.server.entries), line.server.verdicts, line.rows()) == (2, [], [])


def test_a_score_that_is_no_number_is_unknown_never_pass(line, versions):
    frames = [new_frame(1), new_frame(2, product="blank"), new_frame(3)]
    rows = line.run(*frames)
    assert [row["verdict"] for row in rows] == ["pass", "unknown", "pass"]
    assert rows[1]["reason"] == f"the score of version {versions.blank.version} is not a finite number"
    assert (rows[1]["score"], rows[1]["map_u8"]) == (None, None)
    assert rows[1]["image_jpeg"] == frames[1].picture.data


def test_a_picture_that_no_jpeg_holds_is_judged_all_the_same(line):
    long = Picture.encode(np.zeros((70_000, 4, 3), np.uint8), "raw")
    frames = [new_frame(1, product="nut", picture=long), new_frame(2, product="nut")]
    first, second = line.run(*frames)
    assert (first["verdict"], first["image_jpeg"]) == ("fail", None)
    assert first["map_u8"] is not None
    assert second["image_jpeg"] is not None


def test_evidence_is_kept_of_fails_and_is_the_frames_own(line, residents):
    frames = [new_frame(1), new_frame(2, product="nut"), new_frame(3, product="washer")]
    passed, *failed = line.run(*frames)
    assert (passed["map_u8"], passed["map_min"], passed["map_max"], passed["image_jpeg"]) == (None,) * 4
    for frame, row in zip(frames[1:], failed, strict=True):
        assert row["image_jpeg"] == frame.picture.data
        expected = line.engine.judge([Request(residents[frame.product], frame.picture.decode())])[0].anomaly_map
        kept = dequantised(row["map_u8"], row["map_min"], row["map_max"])
        np.testing.assert_allclose(kept, dequantised(*quantised(expected)), atol=0.01 * expected.max())


MALFORMED = [
    {b"hello": b"world"},
    wire(new_frame()) | {b"v": b"2"},
    wire(new_frame()) | {b"seq": b"-1"},
    wire(new_frame()) | {b"camera": b"\xff"},
    {b"field%d" % number: b"x" for number in range(500)},
]


def test_malformed_entries_are_dead_lettered_and_the_others_judged(line):
    frames = [new_frame(seq) for seq in range(1, 6)]
    for frame, fields in zip(frames, MALFORMED, strict=True):
        line.server.add_fields("bolt", fields)
        line.server.add([frame])
    rows = line.run()
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    assert line.server.judged == {"cam-1": 5}
    assert line.server.dead == {"?": 5}
    assert line.server.balanced
    assert line.server.reasons[:3] == [
        "wire version (missing) is not 1",
        "wire version b'2' is not 1",
        "field seq is b'-1', not a positive integer",
    ]


# --- a store that cannot be written


def test_without_results_nothing_is_acknowledged_and_reading_stops_at_the_bound(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "_RETRY_S", 0.001)
    monkeypatch.setattr(loop_module, "_READ_BLOCK_MS", 1)
    settings = SETTINGS.model_copy(update={"segment_rows": 3})
    line = Line(engine, str(tmp_path / "results"), settings)
    frames = [new_frame(seq) for seq in range(1, 61)]
    shutil.rmtree(tmp_path / "results" / "segments")
    line.server.add(frames)
    # nothing is under way any more, and the tick before read nothing: the line went on for as long as there was room
    line.tick_until(lambda: line.loop.trouble and len(line.server.verdicts) == len(line.server.owners))
    taken = len(line.server.owners)
    line.loop.tick()
    assert len(line.server.owners) == taken
    assert 4 * settings.segment_rows <= taken <= 4 * settings.segment_rows + 3 * settings.max_batch
    assert line.server.judged.total() == 0
    assert "No such file or directory" in line.loop.trouble
    assert line.loop.trouble.endswith("; nothing is acknowledged until it can be written")
    (tmp_path / "results" / "segments").mkdir()
    line.tick_until(lambda: not line.server.entries)
    assert line.loop.trouble is None
    assert_each_once(line, frames)
    line.loop.drain()


def test_a_drain_without_results_hands_everything_back(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"))
    shutil.rmtree(tmp_path / "results" / "segments")
    line.server.add(new_frame(seq) for seq in range(1, 4))
    line.loop.tick()
    line.loop.drain()
    assert len(line.server.entries) == 3
    assert not line.stream.closed


class SlowDisk:
    """Begins writes and ends none of them before `free` is set."""

    def __init__(self, writer: JournallingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.begun: list[int] = []
        write = writer.write

        def slow(rows: list[Row]) -> str:
            self.begun.append(len(rows))
            assert self.free.wait(60)
            return write(rows)

        monkeypatch.setattr(writer, "write", slow)


@pytest.fixture
def patient_line(engine, tmp_path):
    """A line whose frames no other takes over, however long something lasts."""
    made = Line(engine, str(tmp_path / "results"), SETTINGS.model_copy(update={"claim_idle_ms": 600_000}))
    yield made
    made.loop.drain()


def test_verdicts_do_not_wait_for_a_slow_disk(patient_line, monkeypatch):
    line = patient_line
    disk = SlowDisk(line.writer, monkeypatch)
    frames = [new_frame(seq) for seq in range(1, 5)]
    line.server.add(frames[:1])
    line.tick_until(lambda: disk.begun)
    line.server.add(frames[1:])
    line.tick_until(lambda: len(line.server.verdicts) == 4)
    assert (disk.begun, line.server.judged.total(), len(line.server.entries)) == ([1], 0, 4)
    disk.free.set()
    line.tick_until(lambda: not line.server.entries)
    assert disk.begun == [1, 3]  # what came meanwhile is one segment
    assert_each_once(line, frames)


def test_decoded_images_are_not_kept_for_a_slow_disk(patient_line, monkeypatch):
    line = patient_line
    disk = SlowDisk(line.writer, monkeypatch)
    submit, images = line.loop._decoders.submit, []

    def watched(picture: Picture, size: int | None) -> Future[Decoded]:
        image = submit(picture, size)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr(line.loop._decoders, "submit", watched)
    line.server.add(FRAMES)
    line.tick_until(lambda: len(line.server.verdicts) == len(FRAMES) and not line.loop.tick())
    gc.collect()
    assert len(images) == len(FRAMES)
    assert [image() for image in images] == [None] * len(FRAMES)
    disk.free.set()
    line.tick_until(lambda: not line.server.entries)


def test_frames_of_a_disk_that_hangs_are_left_to_others(line, monkeypatch):
    disk = SlowDisk(line.writer, monkeypatch)
    line.server.add([new_frame(1)])
    line.tick_until(lambda: disk.begun)
    line.loop.tick()
    silent_since = line.loop.heartbeat
    until = silent_since + SETTINGS.claim_idle_ms / 1e3
    line.tick_until(lambda: time.monotonic() > until)
    assert line.loop.heartbeat == silent_since
    monkeypatch.setattr(line.stream, "recover", lambda *_: pytest.fail("it still holds on to its frames"))
    line.server.add([new_frame(2)])
    until = time.monotonic() + SETTINGS.claim_idle_ms / 1e3
    line.tick_until(lambda: time.monotonic() > until)
    assert len(line.server.owners) == 1  # and takes no more
    monkeypatch.undo()
    disk.free.set()
    line.tick_until(lambda: not line.server.entries)
    assert line.loop.heartbeat > silent_since


def test_a_loop_whose_disk_hangs_takes_nothing_over(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "_SILENT_S", 0.02)
    line = Line(engine, str(tmp_path / "results"), SETTINGS.model_copy(update={"claim_idle_ms": 600_000}))
    disk = SlowDisk(line.writer, monkeypatch)
    line.server.add([new_frame(1)])
    line.tick_until(lambda: disk.begun and line.loop.trouble)
    assert line.loop.trouble == "the place of the results does not answer; nothing is acknowledged until it does"
    line.server.add([new_frame(2)])
    assert len(MemoryStream(line.server, "dead").read(100, 0)) == 1
    line.server.gone.add("dead")
    calls = line.stream.calls["recover"]
    line.tick_until(lambda: line.stream.calls["recover"] >= calls + 2)
    assert set(line.server.deliveries.values()) == {1}
    disk.free.set()
    line.tick_until(lambda: not line.server.entries)
    assert sorted(line.server.deliveries.values()) == [1, 2]
    assert line.loop.trouble is None
    line.loop.drain()


class SilentPlace:
    """Answers no check before `answers` is set, and then the first one by an error."""

    def __init__(self, writer: JournallingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()
        self.refuses = [True]
        check = writer.check

        def silent() -> None:
            self.asked.set()
            assert self.answers.wait(60)
            if self.refuses and self.refuses.pop():
                raise ResultsUnavailable("cannot write results to here: no room")
            check()

        monkeypatch.setattr(writer, "check", silent)


def test_a_loop_takes_no_frame_before_rows_can_be_written(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "_SILENT_S", 0.0)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(recording_module.logger, "error", lambda form, *words: said.put(form % words))
    line = Line(engine, str(tmp_path / "results"))
    place = SilentPlace(line.writer, monkeypatch)
    line.server.add(FRAMES)
    stop, born = threading.Event(), line.loop.heartbeat
    thread, raised = in_thread(lambda: line.loop.run(stop))
    assert said.get(timeout=60) == "the place of the results does not answer; no frames are taken until it does"
    assert (line.server.owners, line.loop.trouble is None) == ({}, False)
    place.answers.set()
    assert said.get(timeout=60).endswith("no room; no frames are taken until they can be written")
    await_settled(line.server)
    stop.set()
    thread.join(timeout=60)
    assert (raised, line.loop.trouble, line.loop.heartbeat > born) == ([], None, True)
    assert set(line.server.deliveries.values()) == {1}
    assert_each_once(line, FRAMES)


def test_a_loop_that_waits_for_the_place_of_the_results_ends_when_asked(engine, tmp_path, monkeypatch):
    line = Line(engine, str(tmp_path / "results"))
    place = SilentPlace(line.writer, monkeypatch)
    stop = threading.Event()
    thread, raised = in_thread(lambda: line.loop.run(stop))
    assert place.asked.wait(60)
    stop.set()
    thread.join(timeout=60)
    assert (thread.is_alive(), raised) == (False, [])
    place.answers.set()


# --- a server that goes away


@pytest.mark.parametrize("executed", [False, True], ids=["request lost", "reply lost"])
@pytest.mark.parametrize(
    ("method", "call"),
    [
        *itertools.product(["read", "recover"], [1, 2]),
        *itertools.product(["send_verdicts", "settle"], [1, 2, 3]),
        ("dead_letter", 1),
    ],
)
def test_a_connection_lost_at_any_call_loses_and_doubles_nothing(line, method, call, executed):
    line.stream.fail_at, line.stream.executed = (method, call), executed
    line.server.add_fields("bolt", {b"no": b"frame"})
    line.server.add(FRAMES)
    frames = list(FRAMES)

    def done() -> bool:
        if not line.server.entries and line.stream.calls[method] < call:  # rows are written together on a slow disk
            frames.append(new_frame(len(frames) + 1))
            line.server.add(frames[-1:])
        return not line.server.entries

    line.tick_until(done)
    assert Counter(seq for what, seq in line.server.journal if what == "write") == {each.seq: 1 for each in frames}
    assert {row["frame_id"] for row in line.rows()} == {frame.frame_id for frame in frames}
    assert (line.server.judged, line.server.dead) == ({"cam-1": len(frames)}, {"?": 1})
    assert line.server.balanced
    assert {verdict.seq for verdict in line.server.verdicts} == {frame.seq for frame in frames}


def test_a_batch_whose_versions_cannot_be_looked_up_is_judged_later(line, monkeypatch):
    frames = [new_frame(seq, product="mystery") for seq in range(1, 4)]
    with monkeypatch.context() as away:

        def fail(_: str) -> dict[str, str]:
            raise StreamUnavailable("Redis did not answer")

        away.setattr(line.pointers, "of", fail)
        line.server.add(frames)
        with pytest.raises(StreamUnavailable):
            line.loop.tick()
        assert line.server.verdicts == []
    line.tick_until(lambda: not line.server.entries)
    assert [row["seq"] for row in line.rows()] == [1, 2, 3]
    assert set(line.server.deliveries.values()) == {1}  # it was kept, not delivered anew
    assert_each_once(line, frames)


def in_thread(run: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Run beside the test; what it raises is in the list when it has ended."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    return thread, raised


def await_settled(server: MemoryServer) -> None:
    with server.changed:
        assert server.changed.wait_for(lambda: not server.entries, timeout=60)


def test_a_running_loop_waits_for_a_lost_server_and_says_so(line, monkeypatch):
    lost = threading.Event()
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.001)
    monkeypatch.setattr(loop_module.logger, "error", lambda *_: lost.set())
    stop, heartbeat = threading.Event(), line.loop.heartbeat
    thread, raised = in_thread(lambda: line.loop.run(stop))
    line.server.add(FRAMES[:5])
    await_settled(line.server)
    line.stream.away = True
    assert lost.wait(timeout=60)
    assert line.loop.trouble == "Redis did not answer: connection lost"
    line.stream.away = False
    line.server.add(FRAMES[5:])
    await_settled(line.server)
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert (raised, line.loop.trouble, line.stream.closed) == ([], None, True)
    assert line.loop.heartbeat > heartbeat
    assert_each_once(line, FRAMES)


def test_trouble_is_over_when_the_server_is_back_even_if_no_frame_comes(line, monkeypatch):
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.0)
    monkeypatch.setattr(loop_module, "_READ_BLOCK_MS", 1)
    line.stream.fail_at = ("recover", 1)
    stop = threading.Event()
    troubles = []

    def tick(real: Callable[[], None] = line.loop.tick) -> None:
        troubles.append(line.loop.trouble)
        if len(troubles) == 3:
            stop.set()
        real()

    monkeypatch.setattr(line.loop, "tick", tick)
    line.loop.run(stop)
    assert troubles == [None, "Redis did not answer: connection lost", None]


# --- two batches under way


class HeldEngine:
    """Keeps an engine's batches until the product of their first frame may go; `begun` has those products."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._judge = engine.judge
        self._may_go = {product: threading.Event() for product in ("bolt", "nut", "washer")}
        self.begun: list[str] = []
        monkeypatch.setattr(engine, "judge", self._wait_and_judge)

    def _wait_and_judge(self, requests: list[Request]) -> list[Judgement]:
        product = requests[0].resident.card.product
        self.begun.append(product)
        assert self._may_go[product].wait(timeout=60)
        return self._judge(requests)

    def let(self, *products: str) -> None:
        for product in products:
            self._may_go[product].set()


def batches_of(*products: str) -> list[Frame]:
    """Frames for one full batch of each product."""
    size = SETTINGS.max_batch
    return [new_frame(index + 1, products[index // size]) for index in range(size * len(products))]


def test_while_one_batch_is_judged_the_next_waits_with_the_engine_and_no_third(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    frames = batches_of("bolt", "nut", "washer", "bolt")
    line.server.add(frames)
    line.tick_until(lambda: len(held.begun) == 2)
    for _ in range(5):
        line.loop.tick()
    assert set(held.begun) == {"bolt", "nut"}
    assert len(line.server.owners) == 3 * SETTINGS.max_batch
    held.let("bolt")
    line.tick_until(lambda: "washer" in held.begun)
    assert [verdict.seq for verdict in line.server.verdicts] == [1, 2, 3, 4]
    held.let("nut", "washer")
    line.tick_until(lambda: not line.server.entries)
    assert_each_once(line, frames)


def test_rows_become_durable_while_the_next_batch_is_judged(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    line.server.add(batches_of("bolt", "nut"))
    held.let("bolt")
    line.tick_until(lambda: line.server.judged.total() == SETTINGS.max_batch)
    assert [row["seq"] for row in line.rows()] == [1, 2, 3, 4]
    held.let("nut")
    line.tick_until(lambda: not line.server.entries)


def test_batches_end_in_the_order_in_which_they_began(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    frames = batches_of("bolt", "nut")
    line.server.add(frames)
    held.let("nut")  # the second is done first
    line.tick_until(lambda: len(held.begun) == 2)
    for _ in range(5):
        line.loop.tick()
    assert line.server.verdicts == []
    held.let("bolt")
    line.tick_until(lambda: not line.server.entries)
    assert [verdict.seq for verdict in line.server.verdicts] == [frame.seq for frame in frames]
    line.server.add([new_frame(100)])  # what the second batch took is not less than nothing
    line.tick_until(lambda: not line.server.entries)


def test_a_frame_that_comes_while_a_batch_is_judged_waits_for_company(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    frames = [new_frame(1), new_frame(2, "nut"), new_frame(3, "nut")]
    for count, frame in enumerate(frames, start=1):
        line.server.add([frame])
        line.tick_until(lambda count=count: len(line.server.owners) == count and held.begun)
    line.loop.tick()
    assert held.begun == ["bolt"]
    held.let("bolt", "nut")
    line.tick_until(lambda: not line.server.entries)
    assert held.begun == ["bolt", "nut"]  # the second and the third frame were one batch
    assert_each_once(line, frames)


def test_the_loop_is_silent_while_the_engine_is(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    line.server.add([new_frame(1)])
    line.tick_until(lambda: held.begun)
    silent_since = line.loop.heartbeat
    line.stream.away = True
    with pytest.raises(StreamUnavailable):
        line.loop.tick()
    line.stream.away = False
    line.loop.tick()
    assert line.loop.heartbeat == silent_since
    held.let("bolt")
    line.tick_until(lambda: not line.server.entries)
    assert line.loop.heartbeat > silent_since


def test_frames_with_the_engine_are_kept_from_being_taken_over(engine, tmp_path, monkeypatch):
    line = Line(engine, str(tmp_path / "results"), SETTINGS.model_copy(update={"claim_idle_ms": 600_000}))
    held = HeldEngine(line.engine, monkeypatch)
    line.server.add([new_frame(1)])
    line.tick_until(lambda: held.begun)
    recovered = []
    recover = line.stream.recover
    monkeypatch.setattr(line.stream, "recover", lambda held, count: recovered.append(held) or recover(held, count))
    line.tick_until(lambda: recovered)
    assert [entry.id for entry in recovered[0]] == list(line.server.owners)
    held.let("bolt")
    line.tick_until(lambda: not line.server.entries)
    assert set(line.server.deliveries.values()) == {1}
    line.loop.drain()


def test_a_lost_server_is_no_hanging_engine(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    line.server.add(batches_of("bolt", "nut"))
    line.tick_until(lambda: len(held.begun) == 2)
    line.stream.away = True
    held.let("bolt", "nut")
    heartbeats = set()
    until = time.monotonic() + 60
    while len(heartbeats) < 10 and time.monotonic() < until:
        try:
            line.loop.tick()
        except StreamUnavailable:
            heartbeats.add(line.loop.heartbeat)
    assert len(heartbeats) == 10
    line.stream.away = False
    line.tick_until(lambda: not line.server.entries)
    assert_each_once(line, batches_of("bolt", "nut"))


def test_verdicts_do_not_wait_for_another_version_to_be_loaded(registry, versions, tmp_path, monkeypatch):
    engine = Engine(registry, "cpu", dtype=torch.float32)
    engine.install(engine.build("bolt", versions.bolt.version))
    current = {"bolt": versions.bolt.version, "nut": versions.nut.version}
    line = Line(engine, str(tmp_path / "results"), pointers=FixedPointers(current))
    build, verdicts_then = engine.build, []

    def noting(product: str, version: str) -> Resident:
        verdicts_then.append(len(line.server.verdicts))
        return build(product, version)

    monkeypatch.setattr(engine, "build", noting)
    frames = batches_of("bolt", "nut")
    line.run(*frames)
    assert verdicts_then == [SETTINGS.max_batch]
    assert_each_once(line, frames)
    line.loop.drain()


def test_frames_of_an_engine_that_hangs_are_left_to_others(line, monkeypatch):
    held = HeldEngine(line.engine, monkeypatch)
    line.server.add([new_frame(1)])
    line.tick_until(lambda: held.begun)
    until = line.loop.heartbeat + SETTINGS.claim_idle_ms / 1e3
    line.tick_until(lambda: time.monotonic() > until)
    monkeypatch.setattr(line.stream, "recover", lambda *_: pytest.fail("refreshed"))
    line.server.add([new_frame(2)])
    until = time.monotonic() + SETTINGS.claim_idle_ms / 1e3
    line.tick_until(lambda: time.monotonic() > until)
    assert len(line.server.owners) == 1  # and none are added to them
    monkeypatch.undo()
    held.let("bolt")
    line.tick_until(lambda: not line.server.entries)


def test_a_device_that_breaks_during_the_second_batch_leaves_the_first_its_verdicts(line, monkeypatch):
    judge = line.engine.judge

    def break_at_nut(requests: list[Request]) -> list[Judgement]:
        if requests[0].resident.card.product == "nut":
            raise DeviceFault("cuda:0 is broken")
        return judge(requests)

    monkeypatch.setattr(line.engine, "judge", break_at_nut)
    with pytest.raises(DeviceFault, match="cuda:0 is broken"):
        line.run(*batches_of("bolt", "nut"))
    assert [verdict.seq for verdict in line.server.verdicts] == [1, 2, 3, 4]
    assert len(line.server.entries) >= SETTINGS.max_batch


# --- stopping, dying, taking over


def test_a_drain_finishes_what_is_held_and_takes_nothing_new(engine, tmp_path):
    patient = SETTINGS.model_copy(update={"batch_wait_ms": 1e6, "segment_ms": 1e6, "max_batch": 3})
    line = Line(engine, str(tmp_path / "results"), patient)
    frames = [new_frame(seq) for seq in range(1, 9)]
    line.server.add(frames[:2])
    line.loop.tick()
    line.server.add(frames[2:6])
    line.loop.tick()
    line.server.add(frames[6:])
    held = set(line.server.owners)
    assert len(held) == 6
    assert line.server.judged.total() == 0
    stop = threading.Event()
    stop.set()
    line.loop.run(stop)
    assert [row["seq"] for row in line.rows()] == [1, 2, 3, 4, 5, 6]
    assert line.server.judged == {"cam-1": 6}
    assert len(line.server.entries) == 2
    assert line.stream.closed
    batches = Counter(row["infer_ms"] for row in line.rows())
    assert max(batches.values()) <= 3


def test_a_drain_without_server_hands_everything_back(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"))
    line.server.add(FRAMES)
    line.tick_until(lambda: line.server.judged == {"cam-1": 4})
    held = set(line.server.owners)
    assert held
    line.stream.away = True
    line.loop.drain()
    assert set(line.server.owners) == held
    assert not line.stream.closed
    assert line.server.balanced


def test_a_dead_loops_frames_are_finished_by_the_next(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"))
    dead = InspectionLoop(
        MemoryStream(line.server, "dead"), engine, line.residency, line.writer, SETTINGS, replica="dead"
    )
    line.server.add(FRAMES)
    while not line.server.judged:  # some are judged and written, and some only read
        dead.tick()
    line.server.gone.add("dead")
    line.tick_until(lambda: not line.server.entries)
    assert_each_once(line, FRAMES)
    dead.drain()
    line.loop.drain()
    assert line.server.judged == {"cam-1": len(FRAMES)}


def test_a_crowd_of_left_frames_is_taken_over_in_portions(engine, tmp_path):
    line = Line(engine, str(tmp_path / "results"))
    frames = [new_frame(seq) for seq in range(1, 41)]
    line.server.add(frames)
    assert len(MemoryStream(line.server, "dead").read(100, 0)) == 40
    line.server.gone.add("dead")
    held = []

    def tick() -> bool:
        answered = {verdict.id for verdict in line.server.verdicts}
        held.append(sum(owner == "me" for entry, owner in line.server.owners.items() if entry not in answered))
        return not line.server.entries

    line.tick_until(tick)
    assert 0 < max(held) <= 3 * SETTINGS.max_batch
    assert_each_once(line, frames)
    line.loop.drain()


def test_an_unexpected_error_ends_the_loop_and_acknowledges_nothing(line, monkeypatch):
    def fail(_: object) -> str:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr(line.writer, "write", fail)
    line.server.add(FRAMES)
    thread, raised = in_thread(lambda: line.loop.run(threading.Event()))
    thread.join(timeout=60)
    assert [str(error) for error in raised] == ["nobody thought of this"]
    assert len(line.server.entries) == len(FRAMES)
    monkeypatch.undo()
    line.tick_until(lambda: not line.server.entries)
    assert_each_once(line, FRAMES)


# --- swapping


def test_a_swap_falls_between_two_batches(line, versions, residents, monkeypatch):
    """Every look at the version in service finds another one; still no batch mixes them."""
    turn = iter([residents["bolt"], residents["bolt_new"]] * 100)
    require = line.residency.require

    def swap_and_require(product: str) -> Resident:
        line.engine.install(next(turn))
        return require(product)

    monkeypatch.setattr(line.residency, "require", swap_and_require)
    frames = [new_frame(seq) for seq in range(1, 33)]
    rows = line.run(*frames)
    by_version = {versions.bolt.version: residents["bolt"], versions.bolt_new.version: residents["bolt_new"]}
    batches: dict[float, set[str]] = {}
    for frame, row in zip(frames, rows, strict=True):
        alone = judged_alone(line.engine, by_version[row["model_version"]], frame)
        assert row["score"] == pytest.approx(alone, rel=1e-4)
        batches.setdefault(row["infer_ms"], set()).add(row["model_version"])
    assert all(len(used) == 1 for used in batches.values())
    assert set().union(*batches.values()) == set(by_version)


def test_a_swap_in_mid_stream_loses_no_frame_and_mixes_no_weights(line, versions, residents):
    stop = threading.Event()
    thread, raised = in_thread(lambda: line.loop.run(stop))
    frames = [new_frame(seq) for seq in range(1, 121)]
    for index, frame in enumerate(frames):
        line.server.add([frame])
        line.engine.install(residents["bolt" if index // 10 % 2 else "bolt_new"])
    await_settled(line.server)
    stop.set()
    thread.join(timeout=60)
    assert raised == []
    assert_each_once(line, frames)
    by_version = {versions.bolt.version: residents["bolt"], versions.bolt_new.version: residents["bolt_new"]}
    for frame, row in zip(frames, line.rows(), strict=True):
        assert row["score"] == pytest.approx(
            judged_alone(line.engine, by_version[row["model_version"]], frame), rel=1e-4
        )
