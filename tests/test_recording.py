"""Rows on their way to the disk: when a segment begins, and what of a failed one is tried again."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from conftest import new_frame, wire

from producers.frame import Frame
from workers import recording as recording_module
from workers.errors import ResultsUnavailable
from workers.judging import Outcome, Taken
from workers.recording import Recording
from workers.results import Row
from workers.settings import WorkerSettings
from workers.stream import Entry

MINUTE_S = 60.0


@dataclass
class Clock:
    """A steady clock that is set by hand."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return 0


class FailingOnce:
    """A writer whose first segment fails once it is let go."""

    def __init__(self) -> None:
        self.may_fail = threading.Event()
        self.segments: list[list[int]] = []

    def write(self, rows: list[Row]) -> str:
        self.segments.append([row.seq for row in rows])
        if len(self.segments) == 1:
            assert self.may_fail.wait(60)
            raise ResultsUnavailable("no room")
        return "segment"


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(recording_module, "time", made)
    return made


def unknown(frame: Frame) -> Outcome:
    entry = Entry(frame.product, f"{frame.seq}-0".encode(), wire(frame))
    return Outcome(Taken(entry, frame, Future(), 0), "unknown", None, "no model")


def test_rows_of_a_failed_segment_do_not_wait_as_long_as_new_ones(clock):
    writer = FailingOnce()
    recording = Recording(writer, WorkerSettings(segment_ms=MINUTE_S * 1e3), "r")
    recording.add(unknown(new_frame(1)))
    recording.advance()
    assert not recording.is_writing
    clock.now += MINUTE_S
    recording.advance()
    assert recording.is_writing
    recording.add(unknown(new_frame(2)))
    writer.may_fail.set()
    recording.await_written(60)
    recording.advance()
    assert (recording.is_writing, recording.trouble) == (
        False,
        "no room; nothing is acknowledged until it can be written",
    )
    clock.now += 1
    recording.advance()
    recording.await_written(60)
    recording.advance()
    assert writer.segments == [[1], [1, 2]]
    assert [settlement.seq for settlement in recording.durable()] == [1, 2]
    assert (len(recording), recording.trouble) == (2, None)
    recording.acknowledged()
    assert (len(recording), recording.durable()) == (0, [])
    recording.shutdown()
