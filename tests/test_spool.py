"""The queue on disk: order, bounds, and what is left of it after a crash, a bad disk or a full one."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from producers.errors import SpoolError, SpoolFull
from producers.frame import Picture
from producers.spool import Spool
from producers.spooled import HEADER_SIZE, Lost, Record

ROOT = Path(__file__).resolve().parents[1]
MB = 1 << 20


def frame(seq: int, size: int = 1000, first: int = 1) -> Record:
    return Record(seq, first, seq * 1_000_000, Picture("jpeg", (48, 64, 3), bytes([seq % 256]) * size))


def note(seq: int, first: int = 1) -> Record:
    return frame(seq, first=first).shed("drop_newest spool")


def told(entry: Record | Lost | None) -> tuple[str, int] | None:
    """What an entry says, in short."""
    if entry is None:
        return None
    if isinstance(entry, Lost):
        return (f"lost from {entry.from_seq}", entry.seq)
    return (entry.reason or "frame", entry.seq)


def emptied(spool: Spool) -> list[tuple[str, int]]:
    """Take everything."""
    taken = []
    while (entry := spool.peek()) is not None:
        taken.append(told(entry))
        spool.taken(entry.seq)
    assert spool.empty
    return taken


def frames(*numbers: int) -> list[tuple[str, int]]:
    return [("frame", seq) for seq in numbers]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


def filled(folder: Path, last: int, max_bytes: int = MB) -> None:
    """A spool that a process left, with records 1 to `last`."""
    spool = Spool(folder, max_bytes)
    for seq in range(1, last + 1):
        spool.append(frame(seq))
    spool.close()


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.seg"))


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


# --- order and space


@pytest.mark.parametrize("fsync", ["always", "interval"])
def test_records_come_out_whole_and_in_order(folder, fsync):
    spool = Spool(folder, MB, fsync)
    written = [frame(1), frame(2, size=0), note(3), frame(4, size=200_000)]
    for record in written:
        (spool.append if record.picture else spool.note)(record)
    assert (spool.waiting(), spool.last_seq) == ((3, 1), 4)
    read = []
    while (entry := spool.peek()) is not None:
        read.append(entry)
        spool.taken(entry.seq)
    assert [(r.seq, r.first, r.captured_at_ns, r.picture, r.reason) for r in read] == [
        (r.seq, r.first, r.captured_at_ns, r.picture, r.reason) for r in written
    ]
    assert spool.waiting() == (0, 0)
    spool.close()


def test_space_is_given_back_file_by_file(folder):
    filled(folder, 800)
    assert len(segments(folder)) > 8
    spool = Spool(folder, MB)
    full = spool.size
    spool.taken(400)
    assert 0.4 * full < spool.size < 0.6 * full
    assert emptied(spool) == frames(*range(401, 801))
    assert segments(folder) == []
    spool.append(frame(801))
    assert emptied(spool) == frames(801)
    spool.close()


def test_a_full_spool_takes_no_frame_but_notes(folder):
    spool = Spool(folder, 10 * frame(1).size)
    for seq in range(1, 11):
        spool.append(frame(seq))
    with pytest.raises(SpoolFull):
        spool.append(frame(11))
    spool.note(note(11))
    assert spool.size <= 10 * frame(1).size + 100
    spool.taken(3)
    spool.append(frame(12))
    assert emptied(spool) == [*frames(*range(4, 11)), ("drop_newest spool", 11), *frames(12)]
    spool.close()


def test_the_oldest_frames_become_notes_in_their_place(folder):
    spool = Spool(folder, 32 * frame(1).size)
    for seq in range(1, 33):
        spool.append(frame(seq))
    spool.taken(1)
    held = spool.peek()
    for _ in range(2):
        assert spool.shed_oldest("drop_oldest spool")
    assert spool.waiting()[0] < 31
    sheds = 31 - spool.waiting()[0]
    assert spool.waiting() == (31 - sheds, sheds)
    assert told(held) == ("frame", 2)
    spool.taken(2)  # it was on its way
    assert emptied(spool) == [
        *(("drop_oldest spool", seq) for seq in range(3, 2 + sheds)),
        *frames(*range(2 + sheds, 33)),
    ]
    spool.close()


def test_a_spool_of_notes_has_no_frame_to_give_up(folder):
    spool = Spool(folder, MB)
    for seq in (1, 2):
        spool.append(frame(seq))
    assert spool.shed_oldest("drop_oldest spool")
    assert not spool.shed_oldest("drop_oldest spool")
    spool.append(frame(3))
    assert emptied(spool) == [("drop_oldest spool", 1), ("drop_oldest spool", 2), *frames(3)]
    spool.close()


def test_a_reader_waits_for_the_next_record(folder):
    spool, found = Spool(folder, MB), []
    reader = threading.Thread(target=lambda: found.append(told(spool.peek(timeout_s=60))))
    reader.start()
    spool.append(frame(1))
    reader.join(timeout=60)
    assert found == frames(1)
    assert not spool.wait_empty(0)
    spool.taken(1)
    assert spool.wait_empty(0)
    spool.close()


# --- after a process


def test_what_is_left_waits_for_the_next_process(folder):
    filled(folder, 40)
    spool = Spool(folder, MB)
    assert (spool.waiting(), spool.last_seq) == ((40, 0), 40)
    spool.taken(15)
    spool.close()
    again = Spool(folder, MB)
    assert again.waiting() == (25, 0)
    again.append(frame(2000, first=2000))
    assert emptied(again) == frames(*range(16, 41), 2000)
    again.close()
    assert Spool(folder, MB).last_seq == 2000  # so no number comes twice


def test_a_lost_position_gives_what_may_have_been_taken_again(folder):
    filled(folder, 3)
    spool = Spool(folder, MB)
    spool.taken(2)
    spool.close()
    (folder / "position").unlink()
    assert emptied(Spool(folder, MB)) == frames(1, 2, 3)


@pytest.mark.parametrize("left", [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 500, HEADER_SIZE + 1003])
def test_a_torn_tail_is_cut(folder, left):
    filled(folder, 3)
    (path,) = segments(folder)
    size = path.stat().st_size
    os.truncate(path, size - frame(3).size + left)
    spool = Spool(folder, MB)
    spool.append(frame(4))
    assert emptied(spool) == frames(1, 2, 4)
    spool.close()


def test_a_tail_of_zeros_is_cut(folder):
    filled(folder, 3)
    (path,) = segments(folder)
    with path.open("ab") as file:
        file.write(bytes(5000))
    spool = Spool(folder, MB)
    spool.append(frame(4))
    assert emptied(spool) == frames(1, 2, 3, 4)
    spool.close()


@pytest.mark.parametrize(
    "at", [0, 30, HEADER_SIZE - 1, HEADER_SIZE + 1, HEADER_SIZE + 700], ids=lambda at: f"byte {at}"
)
def test_a_flipped_byte_costs_one_frame_and_says_which(folder, at):
    filled(folder, 5)
    damage(segments(folder)[0], 2 * frame(1).size + at)
    spool = Spool(folder, MB)
    assert emptied(spool) == [*frames(1, 2), ("lost from 3", 3), *frames(4, 5)]
    spool.close()


def test_a_damaged_last_frame_of_a_run_is_known_by_the_next_run(folder):
    spool = Spool(folder, MB)
    numbers = [(1, 1), (2, 1), (3, 1), (9 << 20, 9 << 20)]
    for seq, first in numbers:
        spool.append(frame(seq, first=first))
    spool.close()
    damage(segments(folder)[0], 2 * frame(1).size)
    assert emptied(Spool(folder, MB)) == [*frames(1, 2), ("lost from 3", 3), *frames(9 << 20)]


def test_a_missing_file_is_a_range(folder):
    filled(folder, 300)
    first, second, third, *_ = segments(folder)
    numbers = []
    for path in (first, second):
        copy = folder.parent / path.stem
        copy.mkdir()
        shutil.copy(path, copy)
        numbers.append([seq for _, seq in emptied(Spool(copy, MB))])
    second.unlink()
    entries = emptied(Spool(folder, MB))
    assert (f"lost from {numbers[1][0]}", numbers[1][-1]) in entries
    assert [seq for said, seq in entries if said == "frame"] == [*numbers[0], *range(numbers[1][-1] + 1, 301)]
    assert third.exists() is False


# --- one process, one disk


def test_a_second_process_is_told(folder):
    spool = Spool(folder, MB)
    with pytest.raises(SpoolError, match=rf"^another producer uses the spool {folder}: give each [^\n]*$"):
        Spool(folder, MB)
    spool.close()
    Spool(folder, MB).close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match=r"^cannot use the spool [^\n]*file/spool: Not a directory: [^\n]*$"):
        Spool(tmp_path / "file" / "spool", MB)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from producers.errors import SpoolUnwritable
from test_spool import MB, Spool, emptied, frame, note
spool = Spool(Path(sys.argv[1]), 64 * MB)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
refused = []
for seq in range(1, 16):
    try:
        spool.append(frame(seq))
    except SpoolUnwritable as error:
        refused.append(seq)
        said = str(error)
        spool.note(note(seq))
assert said == f"cannot write to the spool {sys.argv[1]}: File too large", said
assert refused == list(range(10, 16)), refused
assert spool.waiting()[0] == 9
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append(frame(16))
print(emptied(spool))
"""


def test_a_full_disk_leaves_the_records_whole_and_the_notes_in_memory(folder):
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    expected = [*frames(*range(1, 10)), *(("drop_newest spool", seq) for seq in range(10, 16)), *frames(16)]
    assert child.stdout.strip() == str(expected)
