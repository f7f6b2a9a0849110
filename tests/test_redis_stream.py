"""The consumer group on a real server: what is delivered, kept, taken over, settled and given up."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import redis
from conftest import full, new_frame, settlement, wire

from producers import keys
from producers.frame import Frame
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers import redis_stream
from workers.errors import StreamUnavailable
from workers.ledger import CameraLedger, read_ledger
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings
from workers.stream import Entry, VerdictMessage

SETTINGS = WorkerSettings(claim_idle_ms=600_000, max_deliveries=3)
ONE_TRY = SETTINGS.model_copy(update={"max_deliveries": 1})


def publish(server: redis.Redis, *frames: Frame) -> None:
    publisher = Publisher(server, PublisherSettings(max_in_flight=10_000))
    for frame in frames:
        publisher.publish(frame)


def account(server: redis.Redis, camera: str = "cam-1", product: str = "bolt") -> CameraLedger:
    ledger = next(each for each in read_ledger(server) if each.product == product)
    assert ledger.balanced
    return next((each for each in ledger.cameras if each.camera == camera), CameraLedger(product, camera))


def verdict(seq: int) -> VerdictMessage:
    return VerdictMessage("bolt", "cam-1", seq, "unknown", float("nan"), 0.25, "", "no model", 1.5)


def make_idle(server: redis.Redis, product: str = "bolt", idle_ms: int = 3_600_000) -> None:
    """Let whatever is delivered of a product look as if nobody had touched it for a while."""
    key = keys.frames(product)
    for entry in server.xpending_range(key, keys.GROUP, "-", "+", 10_000):
        server.xclaim(key, keys.GROUP, entry["consumer"].decode(), 0, [entry["message_id"]], idle=idle_ms, justid=True)


def numbers(entries: list[Entry]) -> list[int]:
    return [int(entry.fields[b"seq"]) for entry in entries]


@pytest.fixture
def stream(server):
    return RedisStream(server, "me", SETTINGS)


@pytest.fixture
def other(server):
    return RedisStream(server, "other", SETTINGS)


# --- reading


def test_what_is_published_is_delivered_once_and_in_order(server, stream, other):
    frames = [new_frame(seq) for seq in range(1, 6)]
    publish(server, *frames)
    entries = stream.read(3, 1)
    assert [Frame.from_fields(entry.product, entry.fields) for entry in entries] == frames[:3]
    assert numbers(other.read(10, 1)) == [4, 5]
    assert stream.read(10, 1) == other.read(10, 0) == []


def test_no_product_starves_another(server, stream):
    publish(server, *(new_frame(seq, product="bolt") for seq in range(1, 101)), new_frame(1, product="nut"))
    publish(server, *(new_frame(seq, product="washer") for seq in range(1, 51)))
    entries = stream.read(30, 1)
    delivered = {name: sum(entry.product == name for entry in entries) for name in ("bolt", "nut", "washer")}
    assert delivered == {"bolt": 10, "nut": 1, "washer": 10}


def test_more_products_than_frames_wanted_are_all_read(server, stream):
    publish(server, *(new_frame(1, product=f"p{number}") for number in range(20)))
    assert len({entry.product for entry in stream.read(4, 1)}) == 20


def test_reading_waits_for_the_first_frame(server, stream):
    publish(server, new_frame(1))
    stream.read(1, 1)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.read, 4, 4000)
        publish(server, new_frame(2))
        assert numbers(reading.result(timeout=60)) == [2]


def test_without_any_product_there_is_nothing(stream):
    assert stream.read(4, 1) == stream.recover([], 100) == []
    stream.close()


def test_new_products_are_found_while_reading(server, stream, monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(redis_stream, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    publish(server, new_frame(1))
    assert len(stream.read(4, 1)) == 1
    publish(server, new_frame(1, product="nut"))
    assert stream.read(4, 0) == []
    clock.now_s = 1.0
    assert [entry.product for entry in stream.read(4, 1)] == ["nut"]


def test_frames_that_came_before_the_first_reader_are_read(server):
    publish(server, new_frame(1))
    assert numbers(RedisStream(server, "late", SETTINGS).read(4, 1)) == [1]


def test_a_product_whose_name_is_no_text_disturbs_nobody(server, stream):
    server.sadd(keys.PRODUCTS, b"\xff\xfe")
    publish(server, new_frame(1))
    assert numbers(stream.read(4, 1)) == [1]
    assert account(server).in_flight == 1


# --- settling


def test_a_settled_frame_is_judged_and_gone(server, stream):
    publish(server, new_frame(1), new_frame(2), new_frame(1, product="nut"))
    entries = stream.read(8, 1)
    stream.settle([settlement(entry) for entry in entries[:2]])
    assert (account(server).captured, account(server).judged, account(server).in_flight) == (2, 2, 0)
    assert account(server, product="nut").in_flight == 1
    assert server.xlen(keys.frames("bolt")) == server.xpending(keys.frames("bolt"), keys.GROUP)["pending"] == 0


def test_a_frame_settled_twice_or_by_two_counts_once(server, stream, other):
    publish(server, new_frame(1), new_frame(2))
    entries = stream.read(8, 1)
    make_idle(server)
    assert other.recover([], 100) == entries
    stream.settle([settlement(entry) for entry in entries])
    stream.settle([settlement(entry) for entry in entries])
    other.settle([settlement(entry) for entry in [*entries, entries[0]]])
    assert (account(server).captured, account(server).judged, account(server).in_flight) == (2, 2, 0)


def test_a_producer_without_ledger_balances(server, stream):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), wire(new_frame(7, camera="foreign")))
    entries = stream.read(4, 1)
    assert account(server, "foreign").captured == 0
    stream.settle([settlement(entry) for entry in entries])
    assert (account(server, "foreign").captured, account(server, "foreign").judged) == (1, 1)


def test_a_frame_whose_entry_was_deleted_while_it_was_judged_counts(server, stream):
    publish(server, new_frame(1))
    entries = stream.read(4, 1)
    server.delete(keys.frames("bolt"))
    for _ in range(2):
        stream.settle([settlement(entry) for entry in entries])
    assert (account(server).captured, account(server).judged, account(server).in_flight) == (1, 1, 0)


def test_settling_makes_room_on_a_full_server(server, stream):
    publish(server, new_frame(1))
    entries = stream.read(4, 1)
    with full(server):
        stream.settle([settlement(entry) for entry in entries])
    assert account(server).judged == 1


def test_nothing_to_settle_or_to_say_is_fine(server, stream):
    stream.settle([])
    stream.send_verdicts([])
    assert server.dbsize() == 0


# --- verdicts


def test_a_verdict_says_what_the_line_needs(server, stream):
    stream.send_verdicts([verdict(7)])
    ((_, fields),) = server.xrange(keys.verdicts("bolt"))
    assert {name.decode(): value.decode() for name, value in fields.items()} == {
        "frame_id": "bolt/cam-1/7",
        "camera": "cam-1",
        "seq": "7",
        "verdict": "unknown",
        "score": "nan",
        "threshold": "0.25",
        "model_version": "",
        "reason": "no model",
        "total_ms": "1.500",
    }


def test_verdicts_are_bounded_and_the_newest_stay(server, stream, monkeypatch):
    monkeypatch.setattr(keys, "VERDICTS_KEPT", 100)
    for start in range(0, 2000, 200):
        stream.send_verdicts([verdict(seq) for seq in range(start, start + 200)])
    kept = [int(fields[b"seq"]) for _, fields in server.xrange(keys.verdicts("bolt"))]
    assert 100 <= len(kept) <= 400  # whole nodes are cut off
    assert kept == list(range(2000 - len(kept), 2000))


# --- taking over


def test_what_a_dead_consumer_left_is_taken_over(server, stream, other):
    publish(server, new_frame(1), new_frame(2), new_frame(1, product="nut"))
    left = stream.read(8, 1)
    assert other.recover([], 100) == []  # not idle for long enough
    make_idle(server)
    make_idle(server, "nut")
    assert other.recover([], 100) == left
    other.settle([settlement(entry) for entry in left])
    assert account(server).judged == 2
    assert account(server, product="nut").judged == 1


def test_what_is_held_is_not_taken_over(server, stream, other):
    publish(server, new_frame(1), new_frame(2))
    kept, forgotten = stream.read(8, 1)
    make_idle(server)
    assert stream.recover([kept], 100) == [forgotten]  # its own, delivered but lost on the way
    make_idle(server)
    stream.recover([kept, forgotten], 100)
    assert other.recover([], 100) == []


def test_holding_on_is_no_delivery(server, stream, other):
    publish(server, new_frame(1))
    entries = stream.read(8, 1)
    for _ in range(10):
        stream.recover(entries, 100)
    make_idle(server)
    assert other.recover([], 100) == entries
    assert server.xlen(keys.dead("bolt")) == 0


def test_no_more_is_taken_over_than_there_is_room_for(server, stream, other):
    publish(server, *(new_frame(seq, product) for seq in range(1, 5) for product in ("bolt", "nut")))
    left = stream.read(8, 1)
    make_idle(server)
    make_idle(server, "nut")
    assert other.recover([], 0) == []
    taken = other.recover([], 3)
    assert len(taken) == 3
    taken += other.recover(taken, 3)
    taken += other.recover(taken, 3)
    assert sorted(taken, key=lambda entry: (entry.product, entry.id)) == left


def test_two_consumers_do_not_take_over_the_same(server, stream, other):
    publish(server, new_frame(1))
    RedisStream(server, "dead", SETTINGS).read(1, 1)
    make_idle(server)
    assert len(stream.recover([], 100)) + len(other.recover([], 100)) == 1


def test_what_was_taken_over_before_something_failed_is_not_lost(server, stream, monkeypatch):
    publish(server, new_frame(1), new_frame(1, product="nut"))
    RedisStream(server, "dead", SETTINGS).read(8, 1)
    make_idle(server)
    make_idle(server, "nut")
    pending_range = server.xpending_range

    def failing(key: str, *args: object, **options: object) -> object:
        if key == keys.frames("nut"):
            raise redis.ConnectionError("its node is away")
        return pending_range(key, *args, **options)

    monkeypatch.setattr(server, "xpending_range", failing)
    taken = stream.recover([], 100)
    assert [entry.product for entry in taken] == ["bolt"]
    with pytest.raises(StreamUnavailable, match="its node is away"):
        stream.recover(taken, 100)
    monkeypatch.undo()
    assert [entry.product for entry in stream.recover(taken, 100)] == ["nut"]


def test_an_entry_that_kills_its_readers_is_dead_lettered(server, stream):
    publish(server, new_frame(1), new_frame(2))
    poison, harmless = stream.read(8, 1)
    stream.settle([settlement(harmless)])
    for _ in range(2):
        make_idle(server)
        assert stream.recover([], 100) == [poison]
    make_idle(server)
    assert stream.recover([], 100) == []
    ((_, fields),) = server.xrange(keys.dead("bolt"))
    assert fields.pop(b"account").startswith(b"cam-1 ")
    assert fields == {b"reason": b"delivered 3 times without a row", **poison.fields}
    counts = account(server)
    assert (counts.captured, counts.judged, counts.dead, counts.in_flight) == (2, 1, 1, 0)
    assert server.xlen(keys.frames("bolt")) == server.xpending(keys.frames("bolt"), keys.GROUP)["pending"] == 0


def test_an_entry_in_its_last_delivery_is_left_to_who_holds_it(server):
    publish(server, new_frame(1))
    last_try = RedisStream(server, "me", ONE_TRY)
    (entry,) = last_try.read(1, 1)
    assert RedisStream(server, "other", ONE_TRY).recover([], 100) == []
    last_try.settle([settlement(entry)])
    assert (account(server).judged, account(server).dead) == (1, 0)


@pytest.mark.parametrize("camera", [b"a:b", b"\xff", b"c" * 100_000, None])
def test_a_poisonous_entry_without_a_proper_camera_is_counted_as_such(server, camera):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {"v": 1} if camera is None else {"camera": camera})
    stream = RedisStream(server, "me", ONE_TRY)
    assert len(stream.read(1, 1)) == 1
    make_idle(server)
    assert stream.recover([], 100) == []
    assert (account(server, "?").captured, account(server, "?").dead) == (1, 1)


# --- dead letters


def test_a_malformed_entry_is_kept_with_its_reason(server, stream):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {"camera": "cam-1", "hello": "world"})
    (entry,) = stream.read(4, 1)
    for _ in range(2):  # a second time counts no second time
        stream.dead_letter(entry, "?", "wire version (missing) is not 1")
    ((_, fields),) = server.xrange(keys.dead("bolt"))
    assert fields.pop(b"account").startswith(b"? ")
    assert fields == {b"reason": b"wire version (missing) is not 1", b"camera": b"cam-1", b"hello": b"world"}
    assert (account(server, "?").captured, account(server, "?").dead) == (1, 1)
    assert server.xlen(keys.frames("bolt")) == 0


def test_a_dead_letter_of_a_counted_frame_leaves_nothing_in_flight(server, stream):
    publish(server, new_frame(1))
    (entry,) = stream.read(4, 1)
    stream.dead_letter(entry, "?", "of a version to come")
    counts = account(server)
    assert (counts.captured, counts.dead, counts.in_flight) == (1, 1, 0)
    assert account(server, "?").captured == 0


def test_an_entry_of_hundreds_of_fields_is_noted_not_copied(server, stream):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {f"field{n}": n for n in range(700)})
    (entry,) = stream.read(4, 1)
    stream.dead_letter(entry, "?", "too much")
    ((_, fields),) = server.xrange(keys.dead("bolt"))
    assert fields.pop(b"account").startswith(b"? ")
    assert fields == {b"reason": b"too much", b"fields": b"700"}
    assert account(server, "?").dead == 1


# --- what others do to the server


def test_a_deleted_stream_is_read_again_when_it_is_back(server, stream):
    publish(server, new_frame(1), new_frame(1, product="nut"))
    held = stream.read(8, 1)
    server.delete(keys.frames("bolt"))
    assert stream.recover(held, 100) == []
    assert stream.read(8, 0) == []
    publish(server, new_frame(2))
    assert numbers(stream.read(8, 1)) == [2]
    server.flushall()
    stream.close()


def test_an_emptied_server_is_read_again(server, stream):
    publish(server, new_frame(1))
    stream.read(8, 1)
    server.flushall()
    publish(server, new_frame(2))
    assert [entry for _ in range(2) for entry in numbers(stream.read(8, 1))] == [2]


def test_leaving_removes_only_a_consumer_that_holds_nothing(server, stream, other):
    publish(server, new_frame(1), new_frame(1, product="nut"))
    held = stream.read(8, 1) + other.read(8, 1)
    stream.settle([settlement(entry) for entry in held if entry.product == "nut"])
    stream.close()
    other.close()
    assert consumers(server, "bolt") == {b"me"}
    assert consumers(server, "nut") == set()
    make_idle(server)
    assert numbers(other.recover([], 100)) == [1]


def pending(server: redis.Redis, product: str) -> list[dict]:
    return server.xpending_range(keys.frames(product), keys.GROUP, "-", "+", 100)


def consumers(server: redis.Redis, product: str) -> set[bytes]:
    return {each["name"] for each in server.xinfo_consumers(keys.frames(product), keys.GROUP)}


@pytest.mark.parametrize(
    "call",
    [
        lambda stream, entry: stream.read(4, 1),
        lambda stream, entry: stream.recover([entry], 100),
        lambda stream, entry: stream.recover([], 100),
        lambda stream, entry: stream.send_verdicts([verdict(1)]),
        lambda stream, entry: stream.settle([settlement(entry)]),
        lambda stream, entry: stream.dead_letter(entry, "?", "reason"),
        lambda stream, entry: stream.close(),
    ],
    ids=["read", "refresh", "claim", "verdicts", "settle", "dead letter", "close"],
)
def test_a_server_that_is_gone_is_our_own_error(mortal, call):
    client = mortal.client()
    publish(client, new_frame(1))
    stream = RedisStream(client, "me", SETTINGS)
    (entry,) = stream.read(4, 1)
    mortal.kill()
    with pytest.raises(StreamUnavailable, match=r"^Redis did not answer: [^\n]*$"):
        call(stream, entry)
    client.close()


def test_a_restarted_server_still_knows_what_was_delivered(mortal):
    client = mortal.client()
    publish(client, new_frame(1), new_frame(2))
    stream = RedisStream(client, "me", SETTINGS)
    (first,) = stream.read(1, 1)
    mortal.kill()
    mortal.start()
    assert numbers(stream.read(4, 1)) == [2]
    stream.settle([settlement(first)])
    assert (account(client).judged, account(client).in_flight) == (1, 1)
    client.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_balances_through_any_mixture(server, seed):
    """Three readers read, settle, die and take over in any order; in the end every frame is counted once."""
    choose = random.Random(seed)
    readers = [
        RedisStream(server, f"reader-{number}", SETTINGS.model_copy(update={"max_deliveries": 1000}))
        for number in range(3)
    ]
    held: list[list[Entry]] = [[], [], []]
    seq = 0
    for _ in range(150):
        number = choose.randrange(3)
        reader, own = readers[number], held[number]
        action = choose.choice(["publish", "foreign", "read", "settle", "die", "recover", "idle"])
        if action in ("publish", "foreign"):
            seq += 1
            frame = new_frame(seq, camera=action)
            if action == "publish":
                publish(server, frame)
            else:
                server.sadd(keys.PRODUCTS, "bolt")
                server.xadd(keys.frames("bolt"), wire(frame))
        elif action == "read":
            own += reader.read(choose.randint(1, 5), 0)
        elif action == "settle":
            reader.settle([settlement(entry) for entry in choose.sample(own, len(own) // 2)])  # some of them again
        elif action == "die":
            own.clear()
        elif action == "recover":
            own += reader.recover(own, 100)
        else:
            with contextlib.suppress(redis.ResponseError):  # nobody has read yet, so there is no group
                make_idle(server)
        assert all(product.balanced for product in read_ledger(server))
    last = RedisStream(server, "last", SETTINGS.model_copy(update={"max_deliveries": 1000}))
    while entries := [*last.read(100, 0), *(make_idle(server) or last.recover([], 100))]:
        last.settle([settlement(entry) for entry in entries])
    counts = [account(server, camera) for camera in ("publish", "foreign")]
    assert sum(each.judged for each in counts) == sum(each.captured for each in counts) == seq
    assert server.xlen(keys.frames("bolt")) == 0
