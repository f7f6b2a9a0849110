"""Dead letters on a real server: listed, put back or dropped once, bounded, and the ledger balances throughout."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from conftest import full, new_frame, settlement, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from cluster.dead import drop_dead, list_dead, retry_dead
from cluster.errors import ProctorError
from producers import keys
from producers.frame import Picture
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.dead_letters import DeadLetters
from workers.errors import StreamUnavailable
from workers.ledger import CameraLedger, read_ledger
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings


def account(server: redis.Redis, camera: str = "cam-1", product: str = "bolt") -> CameraLedger:
    ledger = next(each for each in read_ledger(server) if each.product == product)
    assert ledger.balanced
    return next((each for each in ledger.cameras if each.camera == camera), CameraLedger(product, camera))


def bury(server: redis.Redis, count: int, product: str = "bolt", kept: int = 1000, first: int = 1) -> None:
    """Let frames be published, read and given up."""
    stream = RedisStream(server, "me", WorkerSettings(dead_kept=kept))
    for seq in range(first, first + count):
        Publisher(server, PublisherSettings()).publish(new_frame(seq, product))
    for entry in stream.read(10_000, 1):
        stream.dead_letter(entry, "cam-1", "delivered 3 times without a row")


def judge_all(server: redis.Redis) -> list[int]:
    stream = RedisStream(server, "judge", WorkerSettings())
    entries = stream.read(1000, 1)
    numbers = [int(entry.fields[b"seq"]) for entry in entries]
    stream.settle([settlement(entry) for entry in entries])
    return numbers


@pytest.fixture
def letters(server):
    return DeadLetters(server)


# --- listing


def test_the_list_says_what_died_and_why(server, letters):
    before = new_frame(7)
    Publisher(server, PublisherSettings()).publish(before)
    (entry,) = RedisStream(server, "me", WorkerSettings()).read(1, 1)
    RedisStream(server, "me", WorkerSettings()).dead_letter(entry, "cam-1", "no good")
    (letter,) = letters.of("bolt")
    assert (letter.product, letter.camera, letter.seq, letter.reason) == ("bolt", "cam-1", "7", "no good")
    assert letter.captured_at is not None
    assert letter.captured_at.timestamp() == pytest.approx(before.captured_at_ns / 1e9)
    assert letter.size == sum(len(name) + len(value) for name, value in wire(before).items())


def test_the_newest_come_first_and_pages_do_not_matter(server, letters):
    bury(server, 250)
    assert [int(letter.seq) for letter in letters.of("bolt")] == list(range(250, 0, -1))
    assert [int(letter.seq) for letter in list_dead(letters, None, 3).letters] == [250, 249, 248]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.dictionaries(
        st.sampled_from([b"camera", b"seq", b"captured_at_ns", b"reason", b"fields", b"data", b"\xff", b""]),
        st.binary(max_size=30) | st.sampled_from([b"cam-1", b"7", b"x" * 5000, b"[bold]\x1b[2J", b"9" * 19, b"9" * 40]),
        min_size=1,
        max_size=8,
    ),
    counted=st.sampled_from(["?", "cam-1"]),
)
def test_whatever_died_can_be_listed_put_back_and_dropped(server, fields, counted):
    server.flushall()
    server.sadd(keys.PRODUCTS, "bolt")
    stream, letters = RedisStream(server, "me", WorkerSettings()), DeadLetters(server)
    server.xadd(keys.frames("bolt"), fields)
    for _ in range(2):
        (entry,) = stream.read(10, 1)
        stream.dead_letter(entry, counted, "hostile")
        found = list_dead(letters, "bolt", 10)
        assert [letter.reason for letter in found.letters] == ["hostile"]
        assert "\x1b" not in "".join(str(cell) for column in found.table().columns for cell in column.cells)
        assert all(ledger.balanced for ledger in read_ledger(server))
        noted = set(fields) == {b"fields"}
        assert letters.retry("bolt", found.letters[0].id) == ("noted" if noted else "retried")
        assert all(ledger.balanced for ledger in read_ledger(server))
        if noted:
            assert letters.drop("bolt", found.letters[0].id) == "dropped"
            return
    assert letters.counts("bolt").retried == 2


# --- putting back


def test_what_is_put_back_is_in_flight_then_judged_and_counted_once(server, letters):
    bury(server, 3)
    assert (account(server).dead, account(server).in_flight) == (3, 0)
    newest, *_ = [letter.id for letter in letters.of("bolt")]
    assert letters.retry("bolt", newest) == "retried"
    assert letters.retry("bolt", newest) == "gone"
    counts = account(server)
    assert (counts.captured, counts.dead, counts.in_flight) == (3, 2, 1)
    assert counts.oldest_s is not None
    assert judge_all(server) == [3]
    counts = account(server)
    assert (counts.captured, counts.judged, counts.dead, counts.in_flight) == (3, 1, 2, 0)
    assert letters.counts("bolt").retried == 1


def test_it_comes_back_as_it_was(server, letters):
    frame = new_frame(5)
    Publisher(server, PublisherSettings()).publish(frame)
    stream = RedisStream(server, "me", WorkerSettings())
    stream.dead_letter(stream.read(1, 1)[0], "cam-1", "no good")
    retry_dead(letters, "bolt", [], everything=True)
    assert stream.read(1, 1)[0].fields == wire(frame)


def test_one_that_dies_again_is_counted_once(server, letters):
    bury(server, 2)
    for _ in range(3):
        assert retry_dead(letters, None, [], everything=True).done == 2
        bury(server, 0)
    counts = account(server)
    assert (counts.captured, counts.dead, counts.in_flight) == (2, 2, 0)


def test_a_malformed_entry_goes_back_uncounted_and_dies_again(server, letters):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {"camera": "cam-1", "hello": "world"})
    stream = RedisStream(server, "me", WorkerSettings())
    for _ in range(2):
        (entry,) = stream.read(4, 1)
        stream.dead_letter(entry, "?", "wire version (missing) is not 1")
        assert (account(server, "?").captured, account(server, "?").dead) == (1, 1)
        (letter,) = letters.of("bolt")
        assert letters.retry("bolt", letter.id) == "retried"
        assert (account(server, "?").captured, account(server, "?").dead) == (0, 0)


def test_two_entries_of_one_number_balance(server, letters):
    server.sadd(keys.PRODUCTS, "bolt")
    stream = RedisStream(server, "me", WorkerSettings())
    for _ in range(2):
        server.xadd(keys.frames("bolt"), wire(new_frame(9, camera="foreign")))
    for entry in stream.read(4, 1):
        stream.dead_letter(entry, "foreign", "delivered 3 times without a row")
    assert retry_dead(letters, "bolt", [], everything=True).done == 2
    assert judge_all(server) == [9, 9]
    counts = account(server, "foreign")
    assert (counts.captured, counts.judged, counts.dead, counts.in_flight) == (2, 2, 0, 0)


def test_an_entry_of_which_only_a_note_was_kept_can_only_be_dropped(server, letters):
    server.sadd(keys.PRODUCTS, "bolt")
    server.xadd(keys.frames("bolt"), {f"field{n}": n for n in range(700)})
    stream = RedisStream(server, "me", WorkerSettings())
    stream.dead_letter(stream.read(4, 1)[0], "?", "too much")
    outcome = retry_dead(letters, "bolt", [], everything=True)
    assert outcome.line("put back") == "put back 0, 1 cannot be put back: their fields were not kept, drop them"
    assert drop_dead(letters, "bolt", [], everything=True).done == 1
    assert account(server, "?").dead == 1


def test_many_at_once_put_back_each_entry_once(server, letters):
    bury(server, 40)
    ids = [letter.id for letter in letters.of("bolt")]
    start = threading.Barrier(4)

    def retry(seed: int) -> int:
        start.wait()
        mixed = random.Random(seed).sample(ids, len(ids))
        return retry_dead(DeadLetters(server), "bolt", mixed, everything=False).done

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(retry, range(4))) == 40
    assert sorted(judge_all(server)) == list(range(1, 41))
    assert (account(server).judged, account(server).dead) == (40, 0)


def test_a_reply_that_is_lost_puts_nothing_back_twice(server, letters, monkeypatch):
    bury(server, 2)
    evalsha = server.evalsha

    def losing(*args: object) -> object:
        reply = evalsha(*args)
        if reply == b"retried":
            raise redis.ConnectionError("connection lost")
        return reply

    monkeypatch.setattr(server, "evalsha", losing)
    with pytest.raises(StreamUnavailable):
        retry_dead(letters, None, [], everything=True)
    monkeypatch.undo()
    assert retry_dead(letters, None, [], everything=True).done == 1
    assert sorted(judge_all(server)) == [1, 2]
    assert account(server).judged == 2


def test_a_full_server_refuses_to_put_back_and_changes_nothing(server, letters):
    bury(server, 1)
    (letter,) = letters.of("bolt")
    with full(server), pytest.raises(StreamUnavailable, match="maxmemory"):
        letters.retry("bolt", letter.id)
    assert (account(server).dead, account(server).in_flight) == (1, 0)
    with full(server):
        assert letters.drop("bolt", letter.id) == "dropped"


# --- dropping and trimming


def test_what_is_dropped_is_gone_and_stays_counted(server, letters):
    bury(server, 2)
    ids = [letter.id for letter in letters.of("bolt")]
    assert drop_dead(letters, "bolt", [ids[0], ids[0]], everything=False).line("dropped") == (
        "dropped 1, 1 not there any more"
    )
    assert (account(server).dead, letters.counts("bolt").kept, letters.counts("bolt").dropped) == (2, 1, 1)


def test_the_newest_are_kept_and_the_others_counted(server, letters):
    bury(server, 12, kept=5)
    assert [int(letter.seq) for letter in letters.of("bolt")] == [12, 11, 10, 9, 8]
    counts = letters.counts("bolt")
    assert (counts.kept, counts.trimmed) == (5, 7)
    assert account(server).dead == 12
    assert "bolt: 5 kept, 0 retried, 0 dropped, 7 trimmed" in list_dead(letters, None, 1).lines()


# --- choosing


def test_a_choice_must_be_clear(server, letters):
    bury(server, 1)
    for ids, everything in (([], False), (["1-1"], True)):
        with pytest.raises(ProctorError, match="by their ids, or all of them by --all"):
            retry_dead(letters, None, ids, everything)
    with pytest.raises(ProctorError, match="'bolt/1' is not the id of a dead letter"):
        drop_dead(letters, None, ["bolt/1"], everything=False)


def test_an_id_of_two_products_needs_a_product(server, letters):
    for product in ("bolt", "nut"):
        server.sadd(keys.PRODUCTS, product)
        server.xadd(keys.dead(product), {"reason": "x", "camera": "cam-1"}, id="5-1")
    server.xadd(keys.dead("nut"), {"reason": "x", "camera": "cam-1"}, id="5-2")
    with pytest.raises(ProctorError, match="5-1 is an entry of bolt and of nut: choose by --product"):
        drop_dead(letters, None, ["5-1"], everything=False)
    assert drop_dead(letters, None, ["5-2", "9-9"], everything=False) == drop_dead(
        letters, "nut", ["5-1", "5-2"], everything=False
    )
    assert letters.counts("bolt").kept == 1


def test_the_commands(server, valkey, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROCTOR_REDIS__URL", valkey.url)
    bury(server, 3)

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["dead", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    document = json.loads(run("list", "--json", "--limit", "2"))
    assert [entry["seq"] for entry in document["entries"]] == ["3", "2"]
    assert document["products"] == [{"product": "bolt", "kept": 3, "retried": 0, "dropped": 0, "trimmed": 0}]
    assert run("retry", document["entries"][0]["id"]) == "put back 1\n"
    assert json.loads(run("drop", "--product", "bolt", "--all", "--json")) == {"done": 2, "gone": 0, "noted": 0}
    assert run("list") == "no dead letters\nbolt: 0 kept, 1 retried, 2 dropped, 0 trimmed\n"
    assert (account(server).dead, account(server).in_flight) == (2, 1)


@pytest.mark.parametrize("captured_at_ns", ["nan", "inf", "0x10", "-5", "9" * 25])
def test_a_dead_letter_without_a_time_goes_back_once_and_the_ledger_balances(server, letters, captured_at_ns):
    bury(server, 1)
    stream = RedisStream(server, "r", WorkerSettings())
    server.xadd(keys.frames("bolt"), {"camera": "cam-1", "seq": "7", "captured_at_ns": captured_at_ns})
    (entry,) = stream.read(8, 1)
    stream.dead_letter(entry, "?", "malformed")
    newest = next(iter(letters.of("bolt")))
    assert letters.retry("bolt", newest.id) == "retried"
    assert letters.retry("bolt", newest.id) == "gone"
    assert server.xlen(keys.frames("bolt")) == 1
    (product,) = read_ledger(server)
    assert product.balanced
    assert sum(camera.dead for camera in product.cameras) == 1


def test_dead_letters_have_a_bound_in_bytes(server, letters):
    stream = RedisStream(server, "r", WorkerSettings(dead_mb=1.0))
    publisher = Publisher(server, PublisherSettings())
    for seq in range(1, 9):
        publisher.publish(new_frame(seq, picture=Picture("raw", (400, 250, 3), bytes(300_000))))
    for entry in stream.read(8, 1):
        stream.dead_letter(entry, "cam-1", "no good")
    assert server.memory_usage(keys.dead("bolt"), samples=0) <= 2**20
    assert 1 <= server.xlen(keys.dead("bolt")) <= 3
    assert letters.counts("bolt").trimmed == 8 - server.xlen(keys.dead("bolt"))


def test_naming_entries_that_are_not_there_is_a_failure(server, valkey, monkeypatch):
    monkeypatch.setenv("PROCTOR_REDIS__URL", valkey.url)
    bury(server, 1)
    for command in ("retry", "drop"):
        done = CliRunner().invoke(app, ["dead", command, "123-0"])
        assert done.exit_code == 1
        assert "1 not there" in done.stdout
