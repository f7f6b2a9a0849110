"""The compactor: every frame once in the table, whenever it is killed, beside others, and while readers read."""

import os
import signal
import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from compacting import Shelf, start_doomed
from deltalake.exceptions import DeltaError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_results import START, new_row

from workers import compactor as compactor_module
from workers import table
from workers.compactor import Compactor
from workers.errors import Overtaken, ResultsUnavailable
from workers.reading import read_results
from workers.results import SCHEMA
from workers.segments import Segments
from workers.table import ResultTable


@pytest.fixture
def shelf(tmp_path):
    return Shelf(str(tmp_path / "results"))


# --- folding


def test_segments_go_into_the_table_and_nothing_changes_for_readers(shelf):
    shelf.write(1, 2, 3, image_jpeg=b"\xff\xd8", map_u8=b"m" * 4096)
    shelf.write(1, 2, product="nut")
    before = read_results(shelf.uri)
    folded = shelf.fold()
    assert (folded.segments, folded.rows, folded.repeats, folded.waiting) == (2, 5, 0, 0)
    assert shelf.waiting() == 0
    assert read_results(shelf.uri).equals(before)
    assert read_results(shelf.uri).schema == SCHEMA


def test_the_table_is_partitioned_by_product_and_utc_day(shelf):
    shelf.write_rows(
        new_row(1), new_row(2, captured_at=START + timedelta(hours=17, minutes=59, seconds=59)), new_row(3, "nut")
    )
    shelf.write_rows(new_row(4, captured_at=START + timedelta(hours=18)))
    shelf.fold()
    files = shelf.table.files(shelf.table.open())
    assert sorted((file.product, file.day.isoformat(), file.rows) for file in files) == [
        ("bolt", "2026-11-23", 2),
        ("bolt", "2026-11-24", 1),
        ("nut", "2026-11-23", 1),
    ]
    assert {str(path.relative_to(shelf.table.root).parent) for path in shelf.parquet_files()} == {
        "product=bolt/day=2026-11-23",
        "product=bolt/day=2026-11-24",
        "product=nut/day=2026-11-23",
    }


def test_the_first_row_of_a_frame_stays_for_every_reader(shelf):
    shelf.write_rows(new_row(1, score=0.1), new_row(1, score=0.2))
    shelf.write(1, 2, score=0.3)
    assert shelf.read() == {"bolt/cam-1/1": 0.1, "bolt/cam-1/2": 0.3}
    folded = shelf.fold()
    assert (folded.rows, folded.repeats) == (2, 2)
    shelf.write(1, 2, 3, score=0.4)
    kept = {"bolt/cam-1/1": 0.1, "bolt/cam-1/2": 0.3, "bolt/cam-1/3": 0.4}
    assert shelf.read() == kept
    assert shelf.fold().rows == 1
    assert shelf.read() == kept
    assert shelf.table_rows() == sorted(kept)


def test_a_round_without_anything_to_do_commits_nothing(shelf):
    assert shelf.fold().rows == 0
    assert shelf.table.open() is None
    shelf.write(1)
    shelf.fold()
    version = shelf.table.open().version()
    shelf.write(1)
    assert shelf.fold().repeats == 1
    assert shelf.table.open().version() == version
    assert shelf.waiting() == 0


@pytest.mark.parametrize("limit", ["BATCH_SEGMENTS", "BATCH_BYTES"])
def test_a_backlog_is_folded_in_bounded_batches_oldest_first(shelf, monkeypatch, limit):
    sizes = [os.path.getsize(shelf.write(seq)) for seq in range(10)]
    monkeypatch.setattr(compactor_module, limit, 4 if limit == "BATCH_SEGMENTS" else 4 * max(sizes))
    seen = []

    def reached(step: str) -> None:
        if step == "committed":
            seen.append(len(shelf.table_rows()))

    Compactor(shelf.segments, shelf.table, reached).fold_all()
    assert seen == [4, 8, 10]
    assert shelf.table_rows() == sorted(f"bolt/cam-1/{seq}" for seq in range(10))


def test_a_segment_larger_than_a_batch_is_folded_alone(shelf, monkeypatch):
    monkeypatch.setattr(compactor_module, "BATCH_BYTES", 10)
    for seq in range(3):
        shelf.write(seq)
    assert shelf.fold().rows == 3


def test_a_round_ends_early_between_two_batches(shelf, monkeypatch):
    monkeypatch.setattr(compactor_module, "BATCH_SEGMENTS", 2)
    for seq in range(6):
        shelf.write(seq)
    folded = Compactor(shelf.segments, shelf.table).fold_all(lambda folded: folded.rows < 4)
    assert (folded.rows, folded.waiting, shelf.waiting()) == (4, 2, 2)


# --- damage


def other_columns() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("frame_id", pa.string())])) as writer:
        writer.write_table(pa.table({"frame_id": ["bolt/cam-1/1"]}))
    return sink.getvalue().to_pybytes()


def without_product() -> bytes:
    loose = pa.schema([pa.field(field.name, field.type) for field in SCHEMA])
    row = {field.name: None for field in SCHEMA}
    batch = pa.RecordBatch.from_pylist([row], loose)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "columns", "nulls"])
def test_a_damaged_segment_is_set_aside_and_the_rest_goes_on(shelf, kind, caplog):
    contents = {"empty": b"", "cut": b"ARROW1\0\0", "text": b"no arrow file" * 100}
    content = (contents | {"columns": other_columns(), "nulls": without_product()})[kind]
    shelf.write(1)
    damaged = shelf.write(2)
    shelf.write(3)
    Path(damaged).write_bytes(content)
    folded = shelf.fold()
    assert (folded.rows, folded.damaged, shelf.waiting()) == (2, 1, 0)
    aside = f"{shelf.uri}/damaged/{Path(damaged).name}"
    assert shelf.segments.damaged() == [aside]
    assert Path(aside).read_bytes() == content
    assert f"{damaged} is damaged: " in caplog.text
    assert shelf.read().keys() == {"bolt/cam-1/1", "bolt/cam-1/3"}


def test_a_flipped_bit_never_ends_the_compactor(shelf):
    """Every byte of a small segment in turn: its rows come through, or it is set aside; nothing else fails."""
    path = Path(shelf.write(1))
    content = path.read_bytes()
    path.unlink()
    outcomes = {"damaged": 0, "folded": 0}
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 0x55
        path.write_bytes(flipped)
        folded = shelf.fold()
        assert folded.damaged + folded.segments == 1
        outcomes["damaged" if folded.damaged else "folded"] += 1
    assert outcomes["damaged"] > 5
    shelf.write(2)
    assert shelf.fold().rows == 1


# --- killed


def fill(shelf: Shelf) -> dict[str, float]:
    """A table that holds some frames already, and three segments with repeats."""
    shelf.write(1, 2, score=0.1)
    shelf.fold()
    shelf.write(2, 3, score=0.2)
    shelf.write(4, product="nut", score=0.3)
    shelf.write(3, 5, score=0.4)
    scores = {"bolt/cam-1/1": 0.1, "bolt/cam-1/2": 0.1, "bolt/cam-1/3": 0.2}
    return scores | {"nut/cam-1/4": 0.3, "bolt/cam-1/5": 0.4}


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("listed", 1),
        ("read", 1),
        ("compared", 1),
        ("fsync", 1),  # the first Parquet file has its content, but is named by nothing
        ("fsync", 5),  # one partition's file is there, the other's is not
        ("fsync", 10),  # both files are there, but nothing names them
        ("fsync", 11),  # the commit is written, but may not survive a power cut yet
        ("fsync", 13),
        ("committed", 1),
        ("deleted", 1),
        ("deleted", 3),
    ],
)
def test_a_compactor_killed_at_any_step_folds_every_frame_once(shelf, where, times):
    expected = fill(shelf)
    with start_doomed(shelf.uri, where, times) as doomed:
        assert doomed.wait(60) == -signal.SIGKILL
    assert shelf.read() == expected
    shelf.fold()
    assert shelf.waiting() == 0
    assert shelf.table_rows() == sorted(expected)
    assert shelf.read() == expected


def test_a_new_table_survives_a_compactor_killed_at_its_first_commit(shelf):
    shelf.write(1, 2)
    with start_doomed(shelf.uri, "fsync", 1) as doomed:
        assert doomed.wait(60) == -signal.SIGKILL
    assert shelf.read().keys() == {"bolt/cam-1/1", "bolt/cam-1/2"}
    assert shelf.fold().rows == 2
    assert shelf.table_rows() == ["bolt/cam-1/1", "bolt/cam-1/2"]


def test_segments_are_deleted_only_when_the_commit_is_on_the_disk(shelf, monkeypatch):
    """Otherwise a power cut between the two would lose rows that were promised to be durable."""
    shelf.write(1)
    synced = []
    sync = os.fsync

    def fsync(opened: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{opened}"), shelf.waiting()))
        sync(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    shelf.fold()
    assert {waiting for _, waiting in synced} == {1}
    names = [name.removeprefix(f"{shelf.table.root}/") for name, _ in synced]
    assert names[0].startswith("product=bolt/day=2026-11-23/part-")
    assert names[-2:] == ["_delta_log/00000000000000000001.json", "_delta_log"]


def test_repeats_of_a_killed_compactor_are_deleted_only_when_its_commit_is_on_the_disk(shelf, monkeypatch):
    shelf.write(1)
    with start_doomed(shelf.uri, "committed", 1) as doomed:
        assert doomed.wait(60) == -signal.SIGKILL
    synced = []
    name_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append((os.readlink(name_of(opened)), shelf.waiting())))
    assert shelf.fold().repeats == 1
    assert [(Path(name).name, waiting) for name, waiting in synced] == [
        ("00000000000000000001.json", 1),
        ("_delta_log", 1),
    ]
    assert shelf.waiting() == 0


# --- two at once


def test_a_commit_beside_another_writer_fails_instead_of_doubling(shelf):
    shelf.write(0)
    shelf.fold()
    rows = pa.Table.from_pylist([asdict(new_row(1))], SCHEMA)
    mine, theirs = shelf.table.open(), shelf.table.open()
    shelf.commits.append(theirs, rows)
    files = shelf.parquet_files()
    with pytest.raises(Overtaken):
        shelf.commits.append(mine, rows)
    assert shelf.table_rows() == ["bolt/cam-1/0", "bolt/cam-1/1"]
    assert shelf.parquet_files() == files  # nothing is left of the attempt


def test_a_second_compactor_between_comparing_and_committing_doubles_nothing(shelf):
    for seq in range(4):
        shelf.write(seq, seq + 1)
    others = iter([Compactor(Segments(shelf.uri), ResultTable(shelf.uri))])
    steps = []

    def reached(step: str) -> None:
        steps.append(step)
        if step == "compared" and (other := next(others, None)):
            assert other.fold_all().rows == 5

    folded = Compactor(shelf.segments, shelf.table, reached).fold_all()
    assert steps.count("compared") == 2  # it was overtaken and looked again
    assert folded.rows == 0
    assert shelf.table_rows() == [f"bolt/cam-1/{seq}" for seq in range(5)]


def test_a_table_that_is_made_while_it_is_looked_for_is_none_yet_and_no_damage(shelf, monkeypatch):
    shelf.write_rows(new_row(1))
    shelf.fold()
    place = ResultTable(shelf.uri)
    log = Path(place.root) / "_delta_log"
    log.rename(log.with_name("later"))
    opened = []

    def made_meanwhile(*_, **__):
        opened.append(1)
        if len(opened) == 2:  # another process commits between this look and the next one
            log.with_name("later").rename(log)
        raise DeltaError("No files in log segment")

    with monkeypatch.context() as patch:
        patch.setattr(table, "DeltaTable", made_meanwhile)
        assert place.open() is None
    assert place.open() is not None
    with monkeypatch.context() as patch:
        patch.setattr(table, "DeltaTable", made_meanwhile)
        with pytest.raises(ResultsUnavailable, match="No files in log segment"):
            place.open()


def test_two_compactor_processes_without_a_lease_fold_every_frame_once(shelf):
    for seq in range(300):
        shelf.write(seq, seq + 1)
    both = [start_doomed(shelf.uri, "never", 1) for _ in range(2)]
    outputs = [each.communicate(timeout=60)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert sum(int(output) for output in outputs) == 301
    assert shelf.table_rows() == sorted(f"bolt/cam-1/{seq}" for seq in range(301))
    assert shelf.waiting() == 0


# --- reading meanwhile


def test_a_reader_misses_nothing_of_what_is_folded_while_it_reads(shelf, monkeypatch):
    for seq in range(4):
        shelf.write(seq)
    columns = Segments.read_columns

    def folding_after_the_first(self, names):
        for number, part in enumerate(columns(self, names)):
            yield part
            if number == 0:
                assert shelf.fold().rows == 4

    with monkeypatch.context() as patched:
        patched.setattr(Segments, "read_columns", folding_after_the_first)
        assert len(shelf.read()) == 4
    shelf.write(4)
    read = ResultTable.read

    def folding_before(self, names, chosen):
        assert shelf.fold().rows == 1
        return read(self, names, chosen)

    monkeypatch.setattr(ResultTable, "read", folding_before)
    assert len(shelf.read()) == 5


def test_readers_see_every_frame_once_while_a_compactor_works(shelf, monkeypatch):
    monkeypatch.setattr(compactor_module, "BATCH_SEGMENTS", 4)
    expected = {f"bolt/cam-1/{seq}" for seq in range(160)}
    for seq in range(160):
        shelf.write(seq)
    ended = threading.Event()
    failures: list[BaseException] = []

    def fold() -> None:
        try:
            shelf.fold()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=fold)
    thread.start()
    reads = 0
    while not ended.is_set():
        assert shelf.read().keys() == expected
        reads += 1
    thread.join()
    assert failures == []
    assert reads >= 3
    assert shelf.read().keys() == expected
    assert shelf.waiting() == 0


class Crash(BaseException):
    """Ends a compactor where it stands, as far as one can within a process."""


WRITES = st.tuples(st.just("write"), st.lists(st.integers(0, 9), min_size=1, max_size=4))
CRASHES = st.tuples(st.just("crash"), st.integers(0, 14))
STEPS = st.lists(st.one_of(WRITES, CRASHES, st.tuples(st.just("fold"), st.none())), max_size=10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_writes_rounds_and_crashes_gives_each_frame_once(tmp_path_factory, steps):
    shelf = Shelf(str(tmp_path_factory.mktemp("any") / "results"))
    expected: dict[str, float] = {}
    for number, (what, detail) in enumerate(steps):
        if what == "write":
            shelf.write(*detail, score=float(number))
            for seq in detail:
                expected.setdefault(f"bolt/cam-1/{seq}", float(number))
        elif what == "fold":
            shelf.fold()
            assert shelf.table_rows() == sorted(expected)
        else:
            crash_after(shelf, detail)
        assert shelf.read() == expected
    shelf.fold()
    assert shelf.table_rows() == sorted(expected)


def crash_after(shelf: Shelf, steps: int) -> None:
    """A round that ends after so many steps; a sync of a file counts as one."""
    left = iter(range(steps))

    def reached(step: str) -> None:
        if next(left, None) is None:
            raise Crash

    sync = os.fsync
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda opened: (reached("fsync"), sync(opened)))
        try:
            Compactor(shelf.segments, shelf.table, reached).fold_all()
        except Crash:
            return


# --- which files a read opens


def spoil(shelf: Shelf, day: str, product: str = "bolt") -> None:
    """Make the files of a partition unreadable: whoever opens them fails."""
    for path in Path(shelf.table.root, f"product={product}", f"day={day}").glob("*.parquet"):
        path.write_bytes(b"spoiled" * 10)


def test_a_read_since_a_time_opens_no_older_day(shelf):
    shelf.write_rows(new_row(1), new_row(2, captured_at=START + timedelta(days=1)))
    shelf.fold()
    spoil(shelf, "2026-11-23")
    since = START + timedelta(days=1)
    assert read_results(shelf.uri, since=since)["seq"].to_pylist() == [2]
    with pytest.raises(ResultsUnavailable, match="cannot read the table") as caught:
        read_results(shelf.uri, since=START)
    assert "\n" not in str(caught.value)


def test_a_read_since_a_time_opens_no_older_file_of_that_day(shelf):
    shelf.write(1, 2)
    shelf.fold()
    spoil(shelf, "2026-11-23")
    shelf.write(5000)
    shelf.fold()
    since = START + timedelta(seconds=4000)
    assert read_results(shelf.uri, since=since, columns=["seq"])["seq"].to_pylist() == [5000]


def test_a_read_of_frames_opens_no_other_product_and_no_file_of_other_numbers(shelf):
    shelf.write(1, 2)
    shelf.write(1, product="nut")
    shelf.fold()
    spoil(shelf, "2026-11-23")
    assert read_results(shelf.uri, frame_ids=["nut/cam-1/1"], columns=["seq"])["seq"].to_pylist() == [1]
    assert read_results(shelf.uri, product="nut", columns=["seq"])["seq"].to_pylist() == [1]
    shelf.write(7)
    shelf.fold()
    assert read_results(shelf.uri, frame_ids=["bolt/cam-1/7"], columns=["seq"])["seq"].to_pylist() == [7]
    assert read_results(shelf.uri, frame_ids=["absent", "a/b/99999999999999999999"]).num_rows == 0
    with pytest.raises(ResultsUnavailable):
        read_results(shelf.uri, frame_ids=["bolt/cam-1/1"])


def test_frames_the_table_holds_are_found_by_their_ids_alone(shelf):
    """Looking for repeats reads no image: a partition of gigabytes costs what its ids cost."""
    shelf.write(1, image_jpeg=os.urandom(3_000_000))
    shelf.fold()
    file = shelf.parquet_files()[0]
    content = bytearray(file.read_bytes())
    content[1_000_000:2_000_000] = bytes(1_000_000)  # within the image
    file.write_bytes(content)
    shelf.write(1, 2)
    assert shelf.fold().rows == 1
