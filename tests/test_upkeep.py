"""The table's upkeep: retention, few files, a bounded log; and the compactor's rounds, lease and reports."""

import io
import json
import os
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from compacting import Shelf, file_limit
from rich.console import Console
from test_results import START, new_row

from cluster.compacting import compact_once
from cluster.config import load_config
from cluster.status import Status, render
from workers import compactor as compactor_module
from workers import compactor_loop as loop_module
from workers import upkeep as upkeep_module
from workers.compactor_loop import CompactorLoop
from workers.errors import CompactorBusy, ResultsUnavailable, StreamUnavailable
from workers.lease import LEASE, file_lease, lease, redis_lease
from workers.reading import read_results
from workers.reports import read_compactor, write_compactor
from workers.segments import LEFTOVER_AGE
from workers.settings import ResultsSettings
from workers.table import _store_options, _without_query
from workers.upkeep import Upkeep

DAY = timedelta(days=1)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(str(tmp_path / "results"))


def upkeep(shelf: Shelf, days_later: float = 0, **settings) -> None:
    """The upkeep of a compactor that was just started, so many days after the first rows."""
    now = START + timedelta(days=days_later)
    Upkeep(shelf.table, ResultsSettings(**settings), lambda: now).run()


def version(shelf: Shelf) -> int:
    return shelf.table.open().version()


def make_old(*paths: Path) -> None:
    """As if these files had been written two days ago."""
    for path in paths:
        os.utime(path, (time.time() - 2 * 86400,) * 2)


# --- retention


def test_rows_are_kept_for_ever_unless_a_limit_is_set(shelf):
    shelf.write(1)
    shelf.fold()
    upkeep(shelf, days_later=10_000)
    assert shelf.read().keys() == {"bolt/cam-1/1"}


def test_rows_go_a_whole_day_at_a_time_once_all_of_them_are_old_enough(shelf):
    shelf.write_rows(*(new_row(day, captured_at=START + day * DAY) for day in range(4)), new_row(9, "nut"))
    shelf.fold()
    upkeep(shelf, days_later=3, keep_days=3)
    assert len(shelf.read()) == 5  # the first day ended less than three days ago
    upkeep(shelf, days_later=4, keep_days=3)
    assert shelf.read().keys() == {f"bolt/cam-1/{day}" for day in (1, 2, 3)}
    unchanged = version(shelf)
    upkeep(shelf, days_later=4, keep_days=3)
    assert version(shelf) == unchanged


def heavy(shelf: Shelf) -> dict[int, tuple[bool, bool]]:
    """By number, whether a map and whether an image is there."""
    rows = read_results(shelf.uri, columns=["seq", "map_u8", "image_jpeg"]).to_pylist()
    return {row["seq"]: (row["map_u8"] is not None, row["image_jpeg"] is not None) for row in rows}


def test_evidence_goes_and_its_row_stays(shelf):
    kept = {"map_u8": b"m" * 4096, "map_min": 0.5, "map_max": 1.5, "image_jpeg": b"\xff\xd8"}
    shelf.write_rows(*(new_row(day, captured_at=START + day * DAY, **kept) for day in range(3)))
    shelf.write_rows(new_row(10), new_row(11, image_jpeg=b"\xff\xd8"))
    shelf.fold()
    before = read_results(shelf.uri).drop_columns(["map_u8", "image_jpeg"])
    upkeep(shelf, days_later=3, evidence_days=2)
    assert heavy(shelf) == {0: (False, False), 10: (False, False), 11: (False, False), 1: (True, True), 2: (True, True)}
    assert read_results(shelf.uri).drop_columns(["map_u8", "image_jpeg"]).equals(before)


def test_evidence_is_looked_for_once_and_again_in_late_rows(shelf):
    shelf.write(1, image_jpeg=b"\xff\xd8")
    shelf.fold()
    now = START + 10 * DAY
    kept = Upkeep(shelf.table, ResultsSettings(evidence_days=5), lambda: now)
    kept.run()
    unchanged = version(shelf)
    kept.run()
    upkeep(shelf, days_later=10, evidence_days=5)  # another process, which must look for itself
    assert version(shelf) == unchanged
    shelf.write(2, map_u8=b"m" * 4096)
    shelf.fold()
    kept.run()
    assert heavy(shelf) == {1: (False, False), 2: (False, False)}


# --- files


def test_a_day_that_is_over_becomes_one_file(shelf):
    for seq in range(5):
        shelf.write(seq)
        shelf.write(seq, product="nut")
        shelf.fold()
    before = read_results(shelf.uri)
    opened = shelf.table.open().to_pyarrow_dataset()
    upkeep(shelf)
    assert len(shelf.table.files(shelf.table.open())) == 10  # it is the same day still
    upkeep(shelf, days_later=1)
    files = shelf.table.files(shelf.table.open())
    assert sorted((file.product, file.rows) for file in files) == [("bolt", 5), ("nut", 5)]
    assert read_results(shelf.uri).equals(before)
    assert opened.to_table().num_rows == 10  # a reader that came before still finds its files
    unchanged = version(shelf)
    Upkeep(shelf.table, ResultsSettings(), lambda: START + DAY)._merge_steps(files)
    assert Upkeep(shelf.table, ResultsSettings(), lambda: START + DAY)._merge_steps(files) == []
    assert version(shelf) == unchanged


def test_a_day_that_goes_on_is_merged_when_its_files_are_many(shelf, monkeypatch):
    monkeypatch.setattr(upkeep_module, "OPEN_FILES", 4)
    counts = []
    for seq in range(10):
        shelf.write(seq)
        shelf.fold()
        upkeep(shelf)
        counts.append(len(shelf.table.files(shelf.table.open())))
    assert counts == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert len(shelf.read()) == 10


def test_files_that_nothing_names_go_after_a_day(shelf):
    shelf.write(1)
    shelf.fold()
    shelf.write(2)
    shelf.fold()
    folder = shelf.parquet_files()[0].parent
    orphans = [folder / f"part-{name}.zstd.parquet" for name in ("young", "old")]
    for orphan in orphans:
        orphan.write_bytes(b"half a file")
    make_old(orphans[1])
    upkeep(shelf, days_later=1)
    assert [orphan.exists() for orphan in orphans] == [True, False]
    assert len(shelf.parquet_files()) == 4  # two merged into one, and the young orphan
    assert shelf.read().keys() == {"bolt/cam-1/1", "bolt/cam-1/2"}


def test_the_log_is_summed_up_and_what_is_older_than_a_day_goes(shelf, monkeypatch):
    monkeypatch.setattr(upkeep_module, "CHECKPOINT_COMMITS", 10)
    log = Path(shelf.table.root, "_delta_log")
    for seq in range(24):
        shelf.write(seq)
        shelf.fold()
        if seq == 11:
            make_old(*log.glob("*.json"))
        upkeep(shelf)
    checkpoints = list(log.glob("*.checkpoint*.parquet"))
    assert len(checkpoints) >= 2
    assert not (log / f"{1:020d}.json").exists()
    assert len(list(log.glob("*.json"))) < 24
    assert len(shelf.read()) == 24
    shelf.write(3, 24)
    assert shelf.fold().rows == 1  # a table whose log begins with a checkpoint takes rows all the same


@pytest.mark.parametrize("torn", [b"", b'{"version":1', b"\xff", b"{}", b"[]", b'{"version":null}'])
def test_a_torn_note_of_the_last_checkpoint_is_replaced_by_the_next(shelf, monkeypatch, torn):
    monkeypatch.setattr(upkeep_module, "CHECKPOINT_COMMITS", 4)
    note = Path(shelf.table.root, "_delta_log", "_last_checkpoint")
    for seq in range(5):
        shelf.write(seq)
        shelf.fold()
    upkeep(shelf)
    first = json.loads(note.read_bytes())["version"]
    note.write_bytes(torn)
    shelf.write(5)
    assert shelf.fold().rows == 1
    upkeep(shelf)
    assert json.loads(note.read_bytes())["version"] > first
    assert len(shelf.read()) == 6


def test_what_killed_writers_left_goes_once_it_is_old(shelf):
    shelf.write(1)
    folder = Path(shelf.uri, "segments")
    (folder / ".0-r-1.arrow.tmp").write_bytes(b"half")
    (folder / ".other").write_bytes(b"someone's")
    assert shelf.segments.remove_leftovers() == 0
    assert shelf.segments.remove_leftovers(datetime.now(UTC) + 2 * LEFTOVER_AGE) == 1
    assert sorted(os.listdir(folder))[0] == ".other"
    assert shelf.waiting() == 1


# --- a full disk


def test_a_full_disk_loses_nothing_and_the_next_round_resumes(shelf):
    shelf.write(1, image_jpeg=os.urandom(200_000))
    shelf.fold()
    shelf.write(2, image_jpeg=os.urandom(200_000))
    files, before = shelf.parquet_files(), read_results(shelf.uri)
    with file_limit(100_000), pytest.raises(ResultsUnavailable, match=r"cannot write the table .*File too large") as e:
        shelf.fold()
    assert "\n" not in str(e.value)
    assert shelf.waiting() == 1
    assert shelf.parquet_files() == files  # nothing half-written fills the disk further
    assert read_results(shelf.uri).equals(before)
    assert shelf.fold().rows == 1
    assert read_results(shelf.uri).equals(before)


def test_a_log_that_cannot_be_written_loses_nothing(shelf):
    shelf.write(1)
    shelf.fold()
    shelf.write(2)
    files = shelf.parquet_files()
    log, aside = Path(shelf.table.root, "_delta_log"), Path(shelf.table.root, "aside")
    delta = shelf.table.open()
    rows = shelf.segments.read(shelf.segments.closed()[0].path)
    log.rename(aside)
    log.write_bytes(b"a file where the log's folder was")
    with pytest.raises(ResultsUnavailable, match="cannot write the table") as caught:
        shelf.commits.append(delta, rows)
    assert "\n" not in str(caught.value)
    log.unlink()
    aside.rename(log)
    assert len(shelf.parquet_files()) == len(files) + 1  # kept, since nothing says that it is not named
    assert shelf.read().keys() == {"bolt/cam-1/1", "bolt/cam-1/2"}
    assert shelf.fold().rows == 1


def test_a_log_that_cannot_be_read_is_said_and_never_read_as_no_table(shelf):
    shelf.write(1)
    shelf.fold()
    log = Path(shelf.table.root, "_delta_log")
    for commit in log.glob("*.json"):
        commit.write_bytes(b"{")
    with pytest.raises(ResultsUnavailable, match="cannot read the table") as caught:
        shelf.read()
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    shelf.write(2)
    with pytest.raises(ResultsUnavailable, match="cannot read the table"):
        shelf.fold()
    assert shelf.waiting() == 1


def test_an_upkeep_that_fails_midway_leaves_the_table_as_it_was(shelf):
    for seq in range(3):
        shelf.write(seq, image_jpeg=os.urandom(60_000))
        shelf.fold()
    before = read_results(shelf.uri)
    with file_limit(100_000), pytest.raises(ResultsUnavailable, match="cannot write the table"):
        upkeep(shelf, days_later=1)
    assert read_results(shelf.uri).equals(before)
    upkeep(shelf, days_later=1)
    assert len(shelf.table.files(shelf.table.open())) == 1
    assert read_results(shelf.uri).equals(before)


# --- the lease


def test_local_results_are_locked_for_one_compactor(shelf):
    with file_lease(shelf.uri) as held:
        assert held()
        with pytest.raises(CompactorBusy, match="another compactor works on"), file_lease(shelf.uri):
            pass
    with file_lease(shelf.uri) as held:
        assert held()


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResultsUnavailable, match="cannot write results to"), file_lease(str(tmp_path / "file")):
        pass


def test_the_lease_in_redis_is_renewed_while_it_is_held_and_given_back(server):
    with redis_lease(server, held_ms=300, renew_s=0.05) as held:
        deadline = time.monotonic() + 0.6
        while time.monotonic() < deadline:  # twice its life
            with pytest.raises(CompactorBusy), redis_lease(server):
                pass
            time.sleep(0.02)
        assert held()
    assert not server.exists(LEASE)


def test_a_lease_that_another_took_over_is_lost_and_left_to_it(server):
    with redis_lease(server, renew_s=0.02) as held:
        server.set(LEASE, "another")
        deadline = time.monotonic() + 10
        while held():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert server.get(LEASE) == b"another"


def test_a_lease_without_redis_is_one_line(mortal):
    client = mortal.client()
    mortal.kill()
    with pytest.raises(StreamUnavailable, match="Redis did not answer"), redis_lease(client):
        pass
    mortal.start()


# --- rounds


def test_the_loop_folds_reports_and_does_a_last_round(shelf, places, server, monkeypatch):
    monkeypatch.setattr(loop_module, "_REPORT_EVERY_S", 0.02)
    shelf.write(1, 2)
    loop = CompactorLoop(shelf.uri, places.connect, ResultsSettings(compact_every_s=1))
    stop = threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop,))
    thread.start()
    await_report(server, lambda report: report["rows"] == 2)
    report = read_compactor(server)
    assert (report["waiting"], report["files"], report["damaged"], report["trouble"]) == (0, 1, 0, None)
    assert report["pid"] == os.getpid()
    shelf.write(3)
    stop.set()
    thread.join(30)
    assert shelf.table_rows() == [f"bolt/cam-1/{seq}" for seq in (1, 2, 3)]


def test_the_loop_reports_a_full_disk_and_resumes_by_itself(shelf, places, server, monkeypatch, caplog):
    monkeypatch.setattr(loop_module, "_REPORT_EVERY_S", 0.02)
    shelf.write(1, image_jpeg=os.urandom(200_000))
    loop = CompactorLoop(shelf.uri, places.connect, ResultsSettings(compact_every_s=1))
    stop = threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop,))
    with file_limit(100_000):
        thread.start()
        await_report(server, lambda report: report["trouble"] and "File too large" in report["trouble"])
    await_report(server, lambda report: report["rows"] == 1 and report["trouble"] is None)
    stop.set()
    thread.join(30)
    assert "File too large" in caplog.text
    assert shelf.waiting() == 0


def await_report(server, wanted) -> None:
    deadline = time.monotonic() + 30
    while not ((report := read_compactor(server)) and wanted(report)):
        assert time.monotonic() < deadline, report
        time.sleep(0.02)


def test_the_report_says_what_was_set_aside(shelf, places):
    Path(shelf.write(1)).write_bytes(b"nothing")
    loop = CompactorLoop(shelf.uri, places.connect, ResultsSettings())
    assert loop.round().damaged == 1
    assert json.loads(json.dumps(loop.state()))["damaged"] == 1


def test_a_round_beside_another_compactor_waits_for_its_turn(shelf, places):
    shelf.write(1)
    loop = CompactorLoop(shelf.uri, places.connect, ResultsSettings())
    with file_lease(shelf.uri):
        with pytest.raises(CompactorBusy):
            loop.round()
        assert shelf.waiting() == 1
    assert loop.round().rows == 1


def test_results_in_an_object_store_are_leased_in_redis(places, server):
    with lease("mock:///results", places.connect) as held:
        assert held()
        assert server.exists(LEASE)
        with pytest.raises(CompactorBusy), lease("mock:///results", places.connect):
            pass
    assert not server.exists(LEASE)


def test_a_lease_lost_in_the_middle_ends_the_round_before_the_next_batch(shelf, places, monkeypatch):
    monkeypatch.setattr(compactor_module, "BATCH_SEGMENTS", 1)
    for seq in range(3):
        shelf.write(seq)
    answers = iter([True, True, False])

    @contextmanager
    def lost_after_two(uri, connect):
        yield lambda: next(answers, False)

    monkeypatch.setattr(loop_module, "lease", lost_after_two)
    folded = CompactorLoop(shelf.uri, places.connect, ResultsSettings()).round()
    assert (folded.segments, shelf.waiting()) == (2, 1)


def test_a_round_by_hand_needs_no_application(shelf, tmp_path):
    shelf.write(1, 2)
    config = load_config(home=tmp_path)
    assert config.results.uri == shelf.uri
    done = compact_once(config)
    assert done.line() == "1 segments folded, 2 new rows, 2 in the table"
    Path(shelf.write(3)).write_bytes(b"nothing")
    assert compact_once(config).line() == (
        "0 segments folded, 0 new rows, 2 in the table; 1 damaged segments lie aside"
    )


def test_a_folder_that_deltalake_would_misread_is_refused(tmp_path):
    shelf = Shelf(str(tmp_path / "per%41cent"))
    shelf.write(1)
    with pytest.raises(ResultsUnavailable, match="a folder has a % in its name"):
        shelf.fold()
    assert shelf.read().keys() == {"bolt/cam-1/1"}
    assert os.listdir(tmp_path) == ["per%41cent"]


def test_the_query_of_an_s3_uri_reaches_deltalake_too():
    uri = "s3://plant/results?endpoint_override=store:9000&scheme=http&region=eu-central-1"
    assert _without_query(uri) == "s3://plant/results"
    assert _store_options(uri) == {
        "AWS_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL": "http://store:9000",
        "AWS_ALLOW_HTTP": "true",
    }
    assert _store_options("/var/lib/results") == {}


REPORT = {"rows": 1024, "waiting": 2, "damaged": 0, "trouble": None}


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (None, "no compactor reports: results stay in segments until one runs"),
        (REPORT | {"rows": None}, "results: the compactor has not done a round yet"),
        (REPORT, "results: 1,024 in the table, 2 segments waiting"),
        (REPORT | {"damaged": 1}, "results: 1,024 in the table, 2 segments waiting, 1 damaged segments set aside"),
        (REPORT | {"trouble": "cannot write"}, "results: cannot write"),
    ],
)
def test_the_status_says_how_the_table_is_in_a_line(server, report, line):
    if report:
        write_compactor(server, report)
    status = Status.read(server)
    assert status.as_dict()["compactor"] == report
    console = Console(width=120, file=io.StringIO())
    console.print(render(status))
    assert line in console.file.getvalue()
