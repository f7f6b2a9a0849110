"""The spool against a model, through any order of appends, sheds, takings and crashes at any moment of a write."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from producers.errors import SpoolFull
from producers.frame import Picture
from producers.spool import Spool
from producers.spooled import Lost, Record

BOUND = 4000
Held = list[tuple[int, str]]


def read_out(folder: Path) -> Held:
    """What a process would find in a copy of the folder: number and kind of each record."""
    copy = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(folder, copy / "spool")
    held = []
    with mock.patch("os.fsync"), mock.patch("os.fdatasync"):
        spool = Spool(copy / "spool", BOUND)
        while (entry := spool.peek()) is not None:
            held.append((entry.seq, "lost" if isinstance(entry, Lost) else entry.reason or "frame"))
            spool.taken(entry.seq)
        spool.close()
    shutil.rmtree(copy)
    return held


class SpoolMachine(RuleBasedStateMachine):
    """`held` is what the spool must hold; each step is also cut off at each of its waits for the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="proctor-test-"))
        self.folder = self.home / "spool"
        self.spool = Spool(self.folder, BOUND, "always")
        self.held: Held = []
        self.seq = 0

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.home)

    @contextmanager
    def cut_off_anywhere(self) -> Iterator[None]:
        """A copy of the folder, taken at any wait for the disk in this step, holds what was before it or after it."""
        before, copies = list(self.held), []

        def copy(_: int) -> None:
            copies.append(self.home / f"copy-{len(copies)}")
            shutil.copytree(self.folder, copies[-1])

        # the copies stand for the disk, so the real wait is spared
        with mock.patch("os.fsync", copy), mock.patch("os.fdatasync", copy):
            yield
        for each in copies:
            assert read_out(each) in (before, self.held)
            shutil.rmtree(each)

    @rule(size=st.integers(0, 900), shed=st.booleans())
    def append(self, size: int, shed: bool) -> None:
        self.seq += 1
        record = Record(self.seq, 1, self.seq, Picture("jpeg", (1, 1, 3), b"P" * size))
        with self.cut_off_anywhere():
            if shed:
                self.spool.note(record.shed("note"))
                self.held.append((self.seq, "note"))
                return
            try:
                self.spool.append(record)
                self.held.append((self.seq, "frame"))
            except SpoolFull:
                assert self.spool.size + record.size > BOUND
                self.spool.note(record.shed("full"))
                self.held.append((self.seq, "full"))

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        for _ in range(min(count, len(self.held))):
            entry = self.spool.peek()
            assert isinstance(entry, Record)
            assert (entry.seq, entry.reason or "frame") == self.held[0]
            with self.cut_off_anywhere():
                self.spool.taken(entry.seq)
                self.held.pop(0)

    @rule()
    def shed_oldest(self) -> None:
        with self.cut_off_anywhere():
            done = self.spool.shed_oldest("old")
            kinds = dict(self.held)
            frames = [seq for seq, kind in self.held if kind == "frame"]
            left, _ = self.spool.waiting()
            assert done == bool(frames)
            assert left < len(frames) or not frames
            gone = set(frames[: len(frames) - left])
            self.held[:] = [(seq, "old" if seq in gone else kinds[seq]) for seq, _ in self.held]

    @rule(torn=st.binary(max_size=90), begun=st.integers(0, 150))
    def die(self, torn: bytes, begun: int) -> None:
        """The process ends in the middle of an append; the next one finds all else."""
        broken = Record(self.seq + 1, 1, 1, Picture("jpeg", (1, 1, 3), b"P" * 100)).to_bytes()
        self.spool.close()
        for path in sorted(self.folder.glob("*.seg"))[-1:]:
            with path.open("ab") as file:
                file.write(b"".join(broken)[:begun] + torn)
        self.spool = Spool(self.folder, BOUND, "always")

    @invariant()
    def agrees(self) -> None:
        frames = sum(kind == "frame" for _, kind in self.held)
        assert self.spool.waiting() == (frames, len(self.held) - frames)
        assert self.spool.empty == (not self.held)
        assert self.spool.last_seq == self.seq
        assert read_out(self.folder) == self.held


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
