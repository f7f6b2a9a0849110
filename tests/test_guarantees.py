"""What is promised of a frame that does not go the plain way: shed, lost, late, sent again, each counted exactly."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import redis
from conftest import new_frame

from producers import keys
from producers.frame import Frame, Picture
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from workers.deadlines import DeadlineWatch
from workers.errors import StreamUnavailable
from workers.ledger import CameraLedger, read_ledger
from workers.redis_stream import RedisStream
from workers.settings import LineSettings, WorkerSettings
from workers.shifts import ShiftAccount, read_shift
from workers.stream import Entry, Settlement, VerdictMessage

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def publisher(server: redis.Redis, **settings: object) -> Publisher:
    return Publisher(server, PublisherSettings.model_validate(settings))


def account(server: redis.Redis, camera: str = "cam-1") -> CameraLedger:
    """The camera's ledger, which balances, and so does its shift, with the same counts."""
    (product,) = read_ledger(server)
    assert product.balanced
    ledger = next(each for each in product.cameras if each.camera == camera)
    shift = next(each for each in read_shift(server, LONG_AGO) if each.camera == camera)
    assert shift.balanced
    assert (shift.captured, shift.judged, shift.shed, shift.dead) == (
        ledger.captured,
        ledger.judged,
        ledger.shed_by,
        ledger.dead,
    )
    assert (shift.lost, shift.late, shift.in_flight) == (
        ledger.lost,
        ledger.verdicts.get("late", 0),
        ledger.in_flight,
    )
    return ledger


def verdicts(server: redis.Redis) -> list[tuple[int, str, str]]:
    return [
        (int(fields[b"seq"]), fields[b"verdict"].decode(), fields[b"reason"].decode())
        for _, fields in server.xrange(keys.verdicts("bolt"))
    ]


def numbers(server: redis.Redis) -> list[int]:
    return [int(fields[b"seq"]) for _, fields in server.xrange(keys.frames("bolt"))]


def judge(stream: RedisStream, entries: list[Entry], verdict: str = "pass") -> set[str]:
    """Answer and settle entries as the loop does."""
    frames = [Frame.from_fields(entry.product, entry.fields) for entry in entries]
    late = stream.send_verdicts(
        [
            VerdictMessage(f.product, f.camera, f.seq, verdict, 0.5, 0.25, "v1", "", 1.0, e.id)
            for e, f in zip(entries, frames, strict=True)
        ]
    )
    stream.settle(
        [
            Settlement(
                f.product,
                e.id,
                f.camera,
                f.seq,
                "unknown" if f.frame_id in late else verdict,
                len(f.picture.data),
                f.captured_at_ns,
            )
            for e, f in zip(entries, frames, strict=True)
        ]
    )
    return late


@pytest.fixture
def stream(server):
    return RedisStream(server, "r", WorkerSettings())


# --- back-pressure


def test_drop_newest_gives_up_the_frame_in_hand(server):
    pushing = publisher(server, policy="drop_newest", max_in_flight=2)
    published = [pushing.publish(new_frame(seq)) for seq in range(1, 6)]
    assert published == [Published.ADDED] * 2 + [Published.SHED] * 3
    assert numbers(server) == [1, 2]
    counts = account(server)
    assert (counts.captured, counts.shed_by, counts.in_flight) == (5, {"drop_newest frames": 3}, 2)
    assert verdicts(server) == [(seq, "unknown", "shed: drop_newest, bound of frames") for seq in (3, 4, 5)]


def test_drop_oldest_gives_up_the_oldest_that_nobody_has(server, stream):
    pushing = publisher(server, policy="drop_oldest", max_in_flight=3)
    for seq in (1, 2, 3):
        pushing.publish(new_frame(seq))
    (held,) = stream.read(1, 1)
    for seq in (4, 5):
        assert pushing.publish(new_frame(seq)) is Published.ADDED
    assert numbers(server) == [1, 4, 5]  # 1 is in a replica's hands
    assert pushing.gave_way == 2
    assert account(server).shed_by == {"drop_oldest frames": 2}
    assert [seq for seq, *_ in verdicts(server)] == [2, 3]
    judge(stream, [held, *stream.read(8, 1)])
    counts = account(server)
    assert (counts.captured, counts.judged, counts.shed, counts.in_flight) == (5, 3, 2, 0)
    assert server.get(keys.held("bolt")) == b"0"


def test_drop_oldest_keeps_its_bound_when_replicas_hold_everything(server, stream):
    pushing = publisher(server, policy="drop_oldest", max_in_flight=2)
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    stream.read(8, 1)
    assert pushing.publish(new_frame(3)) is Published.SHED
    assert numbers(server) == [1, 2]
    assert account(server).shed == 1


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_bytes_are_a_bound_too(server, policy):
    picture = Picture("raw", (64, 64, 3), bytes(64 * 64 * 3))
    pushing = publisher(server, policy=policy, max_in_flight_mb=3.5 * len(picture.data) / 2**20)
    for seq in range(1, 7):
        pushing.publish(new_frame(seq, picture=picture))
    assert len(numbers(server)) == 3
    assert account(server).shed_by == {f"{policy} bytes": 3}
    assert int(server.get(keys.held("bolt"))) == 3 * len(picture.data)


def test_one_frame_larger_than_the_bound_still_passes(server):
    pushing = publisher(server, policy="drop_newest", max_in_flight_mb=1e-6)
    assert [pushing.publish(new_frame(seq)) for seq in (1, 2)] == [Published.ADDED, Published.SHED]


def test_a_server_whose_memory_is_nearly_full_takes_no_more(server):
    used = server.info("memory")["used_memory"]
    server.config_set("maxmemory", int(used * 1.2))
    try:
        assert publisher(server, policy="drop_newest").publish(new_frame(1)) is Published.SHED
    finally:
        server.config_set("maxmemory", 0)
    assert account(server).shed_by == {"drop_newest memory": 1}


def test_a_server_without_memory_still_counts_what_is_shed(server):
    pushing = publisher(server, policy="drop_oldest", memory_share=1.0)
    pushing.publish(new_frame(1))
    server.config_set("maxmemory", 1)
    try:
        assert pushing.publish(new_frame(2)) is Published.SHED
    finally:
        server.config_set("maxmemory", 0)
    counts = account(server)
    assert (counts.captured, counts.shed_by, counts.in_flight) == (2, {"drop_oldest memory": 1}, 1)


# --- gaps


def test_a_number_that_never_came_is_lost_with_its_range(server):
    pushing = publisher(server)
    for seq in (5, 6, 10):
        pushing.publish(new_frame(seq))
    counts = account(server)
    assert (counts.captured, counts.lost, counts.in_flight) == (6, 3, 3)
    (shift,) = read_shift(server, LONG_AGO)
    assert [(gap.camera, gap.first, gap.last) for gap in shift.gaps] == [("cam-1", 7, 9)]


def test_numbers_of_sixteen_digits_are_kept_whole(server):
    first = 1_900_000_000 << 20
    pushing = publisher(server)
    for seq in (first, first + 3):
        pushing.publish(new_frame(seq))
    (shift,) = read_shift(server, LONG_AGO)
    assert [(gap.first, gap.last) for gap in shift.gaps] == [(first + 1, first + 2)]


def test_a_restarted_camera_leaves_no_gap(server):
    publisher(server).publish(new_frame(5))
    publisher(server).publish(new_frame(1000))
    assert account(server).lost == 0


def test_a_run_that_began_earlier_counts_what_never_came(server):
    pushing = publisher(server)
    pushing.begin_run("bolt", "cam-1", 100)
    pushing.publish(new_frame(103))
    assert account(server).lost == 3


def forget_last(server: redis.Redis, seq: int, forgotten: list[int]) -> None:
    """Leave the server as a power cut does that took the last second with it."""
    for entry_id, fields in server.xrange(keys.frames("bolt")):
        if int(fields[b"seq"]) in forgotten:
            server.xdel(keys.frames("bolt"), entry_id)
    members = [f"cam-1/{each}" for each in forgotten]
    server.zrem(keys.waiting("bolt"), *members)
    server.zrem(keys.unanswered("bolt"), *members)
    server.hset(keys.ledger("bolt"), "cam-1:last_seq", seq)
    for key in (keys.ledger("bolt"), *server.keys("tally:*")):
        for name in server.hkeys(key):
            if name.endswith(b"captured"):
                server.hincrby(key, name, -len(forgotten))


def test_what_the_server_forgot_is_sent_again(server, stream):
    pushing = publisher(server)
    frames = [new_frame(seq) for seq in range(1, 7)]
    for frame in frames[:5]:
        pushing.publish(frame)
    forget_last(server, 2, [3, 4, 5])
    pushing.publish(frames[5])
    assert numbers(server) == [1, 2, 3, 4, 5, 6]
    counts = account(server)
    assert (counts.captured, counts.lost, counts.in_flight) == (6, 0, 6)
    judge(stream, stream.read(16, 1))
    assert account(server).judged == 6


def test_what_is_retained_no_more_is_counted_as_lost(server):
    pushing = publisher(server, retain_s=0)
    for seq in range(1, 6):
        pushing.publish(new_frame(seq))
    forget_last(server, 2, [3, 4, 5])
    pushing.publish(new_frame(6))
    counts = account(server)
    assert (counts.captured, counts.lost, counts.in_flight) == (6, 3, 3)
    (shift,) = read_shift(server, LONG_AGO)
    assert [(gap.first, gap.last) for gap in shift.gaps] == [(3, 5)]


def test_a_frame_sent_again_counts_once_even_if_its_first_entry_is_judged_too(server, stream):
    """A replica still holds an entry that the server forgot, while another is given its successor."""
    pushing = publisher(server)
    pushing.publish(new_frame(1))
    second = new_frame(2)
    pushing.publish(second)
    held = stream.read(8, 1)
    forget_last(server, 1, [2])
    pushing.publish(new_frame(3))
    again = stream.read(8, 1)
    assert sorted(numbers(server)) == [1, 2, 3]
    judge(stream, held)
    judge(stream, again)
    counts = account(server)
    assert (counts.captured, counts.judged, counts.in_flight) == (3, 3, 0)
    assert sorted(seq for seq, *_ in verdicts(server)) == [1, 2, 3]


# --- deadlines


def overdue(seq: int, age_s: float = 1.0) -> Frame:
    return replace(new_frame(seq), captured_at_ns=time.time_ns() - int(age_s * 1e9))


def test_a_frame_without_verdict_is_answered_when_its_deadline_comes(server, stream):
    watch = DeadlineWatch(server, WorkerSettings(takt_ms=500))
    pushing = publisher(server)
    for frame in (overdue(1), overdue(2, 0.0)):
        pushing.publish(frame)
    assert watch.tick() < 0.5
    assert verdicts(server) == [(1, "unknown", "late: no verdict within 500 ms")]
    watch.tick()
    assert len(verdicts(server)) == 1  # once
    assert judge(stream, stream.read(8, 1)) == {"bolt/cam-1/1"}
    assert [(seq, verdict) for seq, verdict, _ in verdicts(server)] == [(1, "unknown"), (2, "pass")]
    counts = account(server)
    assert counts.verdicts == {"pass": 1, "unknown": 1, "late": 1}
    assert not server.exists(keys.late("bolt"))


def test_an_answered_frame_is_never_late(server, stream):
    publisher(server).publish(overdue(1))
    (entry,) = stream.read(8, 1)
    stream.send_verdicts([VerdictMessage("bolt", "cam-1", 1, "fail", 0.5, 0.25, "v1", "", 1.0)])
    DeadlineWatch(server, WorkerSettings(takt_ms=500)).tick()
    assert judge(stream, [entry], "fail") == set()
    assert [verdict for _, verdict, _ in verdicts(server)] == ["fail"]


def test_each_product_has_its_own_takt(server):
    pushing = publisher(server)
    for product in ("bolt", "nut"):
        pushing.publish(replace(overdue(1), product=product))
    watch = DeadlineWatch(server, LineSettings(takts_ms={"bolt": 100}))
    watch.tick()
    assert len(verdicts(server)) == 1
    assert server.xlen(keys.verdicts("nut")) == 0


def test_a_product_that_cannot_be_watched_takes_no_other_along(server):
    products = ("bolt", "nut", "washer")
    for product in products:
        publisher(server).publish(replace(overdue(1), product=product))
    broken = next(iter(server.smembers(keys.PRODUCTS))).decode()  # the one that is looked at first
    server.delete(keys.unanswered(broken))
    server.set(keys.unanswered(broken), "no set")
    with pytest.raises(StreamUnavailable, match="WRONGTYPE"):
        DeadlineWatch(server, WorkerSettings(takt_ms=500)).tick()
    answered = {product for product in products if server.xlen(keys.verdicts(product))}
    assert answered == {*products} - {broken}


def test_a_late_frame_is_answered_within_its_takt(server):
    """The watch finds the frame by itself, while nobody reads the stream."""
    settings = WorkerSettings(takt_ms=400, takt_margin_ms=50)
    stop = threading.Event()
    watching = threading.Thread(target=DeadlineWatch(server, settings).run, args=(stop,))
    watching.start()
    frame = new_frame(1)
    publisher(server).publish(frame)
    ((_, ((entry_id, fields),)),) = server.xread({keys.verdicts("bolt"): 0}, block=4000)
    stop.set()
    watching.join()
    assert fields[b"verdict"] == b"unknown"
    answered_ms = int(entry_id.split(b"-")[0]) - frame.captured_at_ns // 1_000_000
    assert 300 < answered_ms < 400


def test_a_producers_clock_that_is_wrong_is_seen_and_moves_no_deadline(server, monkeypatch):
    ahead_ns = 3600 * 10**9
    monkeypatch.setattr("producers.publisher.time.time_ns", lambda now=time.time_ns: now() + ahead_ns)
    publisher(server).publish(replace(new_frame(1), captured_at_ns=time.time_ns()))
    monkeypatch.undo()
    counts = account(server)
    assert counts.skewed
    assert 3_599_000 < counts.skew_ms < 3_601_000
    DeadlineWatch(server, WorkerSettings(takt_ms=60_000)).tick()
    assert verdicts(server) == []  # an hour ahead, and yet not an hour more of time


# --- shifts


def test_a_shift_holds_the_minutes_of_its_span_only(server, stream):
    now = datetime.now(UTC)
    pushing = publisher(server)
    for seq, age in ((1, timedelta(hours=9)), (2, timedelta(hours=3)), (3, timedelta(minutes=5))):
        pushing.publish(replace(new_frame(seq), captured_at_ns=int((now - age).timestamp() * 1e9)))
    judge(stream, stream.read(1, 1), "fail")

    def shift(since: timedelta, until: timedelta | None = None) -> ShiftAccount:
        (account,) = read_shift(server, now - since, None if until is None else now - until)
        assert account.balanced
        return account

    assert shift(timedelta(hours=10)).captured == 3
    assert (shift(timedelta(hours=8)).captured, shift(timedelta(hours=8)).judged) == (2, 0)
    early = shift(timedelta(hours=10), timedelta(hours=8))
    assert (early.captured, early.verdicts["fail"], early.in_flight) == (1, 1, 0)
    assert read_shift(server, now - timedelta(minutes=2)) == []


def test_dead_letters_are_answered_and_counted_in_their_shift(server, stream):
    publisher(server).publish(new_frame(1))
    (entry,) = stream.read(8, 1)
    for _ in range(2):
        stream.dead_letter(entry, "cam-1", "delivered 3 times without a row")
    assert verdicts(server) == [(1, "unknown", "delivered 3 times without a row")]
    counts = account(server)
    assert (counts.captured, counts.dead, counts.in_flight) == (1, 1, 0)
    assert server.get(keys.held("bolt")) == b"0"


def test_a_malformed_entry_that_names_its_frame_is_answered(server, stream):
    """Whoever pushed it waits for a verdict; one that names no frame has nobody to answer."""
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {"camera": "own", "seq": "7", "codec": "tiff"})
    server.xadd(keys.frames("bolt"), {"camera": "no name", "seq": "x"})
    for entry in stream.read(8, 1):
        stream.dead_letter(entry, "?", "malformed")
    ((seq, verdict, _),) = verdicts(server)
    assert (seq, verdict) == (7, "unknown")
    assert account(server, "?").dead == 2


def test_a_second_entry_of_a_counted_frame_is_neither_shed_nor_dead(server, stream):
    """The server forgot a frame that a replica held, got it again, and saw the replica settle the first entry."""
    pushing = publisher(server, policy="drop_oldest", max_in_flight=3)
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    held = stream.read(8, 1)
    forget_last(server, 1, [2])
    pushing.publish(new_frame(3))
    judge(stream, held)
    assert numbers(server) == [2, 3]
    pushing.publish(new_frame(4))
    pushing.publish(new_frame(5))  # 2 must give way, and has been judged
    assert numbers(server) == [3, 4, 5]
    counts = account(server)
    assert (counts.captured, counts.judged, counts.shed, counts.in_flight) == (5, 2, 0, 3)
    assert sorted(seq for seq, *_ in verdicts(server)) == [1, 2]


def test_a_second_entry_that_is_delivered_too_often_is_no_death(server, stream):
    pushing = publisher(server)
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    held = stream.read(8, 1)
    forget_last(server, 1, [2])
    pushing.publish(new_frame(3))
    judge(stream, held)
    again, third = stream.read(8, 1)
    stream.dead_letter(again, "cam-1", "delivered 3 times without a row")
    judge(stream, [third])
    counts = account(server)
    assert (counts.captured, counts.judged, counts.dead, counts.in_flight) == (3, 3, 0, 0)
    assert numbers(server) == []


def test_a_forgotten_entry_brings_no_second_verdict(server, stream):
    pushing = publisher(server)
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    held = stream.read(8, 1)
    forget_last(server, 1, [2])
    server.xdel(keys.frames("bolt"), held[1].id)
    judge(stream, held)
    pushing.publish(new_frame(3))
    judge(stream, stream.read(8, 1), "fail")
    assert [(seq, verdict) for seq, verdict, _ in verdicts(server)] == [(1, "pass"), (2, "fail"), (3, "fail")]


@pytest.mark.parametrize("counted", ["shed", "lost"])
def test_what_the_server_forgot_is_sent_before_a_note_is_counted(server, counted):
    pushing = publisher(server)
    for seq in range(1, 6):
        pushing.publish(new_frame(seq))
    forget_last(server, 2, [3, 4, 5])
    if counted == "shed":
        pushing.shed(new_frame(6), "drop_oldest spool", threading.Event())
    else:
        pushing.lose(new_frame(6), 6, threading.Event())
    counts = account(server)
    assert (counts.captured, getattr(counts, counted), counts.in_flight) == (6, 1, 5)
    assert numbers(server) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("camera", [b"\xff\xfe", b"a:b", b"x" * 500], ids=["no text", "colon", "long"])
def test_what_names_no_camera_is_shed_under_a_question_mark(server, camera):
    pushing = publisher(server, policy="drop_oldest", max_in_flight=2)
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {"camera": camera, "seq": "1"})
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    assert account(server, "?").shed == 1
    assert account(server).in_flight == 2


def test_another_group_protects_no_frame(server, stream):
    pushing = publisher(server, policy="drop_oldest", max_in_flight=2)
    for seq in (1, 2):
        pushing.publish(new_frame(seq))
    server.xgroup_create(keys.frames("bolt"), "a-monitor", id="0")
    server.xgroup_create(keys.frames("bolt"), "zz-monitor", id="0")
    stream.read(1, 1)
    pushing.publish(new_frame(3))
    assert numbers(server) == [1, 3]


def test_a_gap_belongs_to_the_shift_of_its_frames(server):
    now = datetime.now(UTC)
    pushing = publisher(server)
    for seq, age in ((1, 180), (5, 120)):
        captured_at_ns = int((now - timedelta(minutes=age)).timestamp() * 1e9)
        pushing.publish(replace(new_frame(seq), captured_at_ns=captured_at_ns))
    (early,) = read_shift(server, now - timedelta(hours=4), now - timedelta(minutes=150))
    assert (early.lost, early.gaps) == (0, ())
    (whole,) = read_shift(server, now - timedelta(hours=4))
    assert (whole.lost, len(whole.gaps)) == (3, 1)


def test_a_verdict_that_comes_too_late_is_none(server):
    """No watch has looked yet, as after an outage: the verdict is `unknown` all the same."""
    stream = RedisStream(server, "r", WorkerSettings(takt_ms=500))
    pushing = publisher(server)
    for frame in (overdue(1), overdue(2, 0.0)):
        pushing.publish(frame)
    assert judge(stream, stream.read(8, 1)) == {"bolt/cam-1/1"}
    late, in_time = verdicts(server)
    assert late == (1, "unknown", "late: no verdict within 500 ms")
    assert in_time[:2] == (2, "pass")
    assert account(server).verdicts == {"pass": 1, "unknown": 1, "late": 1}


def test_a_frame_that_was_long_on_its_way_moves_no_clock(server, monkeypatch):
    pushing = publisher(server)
    for seq in range(1, 4):
        pushing.publish(new_frame(seq))
    monkeypatch.setattr("producers.publisher.time.time_ns", lambda now=time.time_ns: now() - 11 * 10**9)
    pushing.publish(new_frame(4))
    monkeypatch.undo()
    assert abs(account(server).skew_ms) < 400


def test_a_short_takt_keeps_most_of_its_time(server):
    assert WorkerSettings(takt_ms=8).margin_of(8.0) == 2.0
    assert WorkerSettings(takt_ms=800).margin_of(800.0) == 10.0
