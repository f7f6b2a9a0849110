"""The ledger as it is read: what became of every frame."""

import json
import threading
import time
from dataclasses import asdict

import pytest
from conftest import new_frame, settlement

from producers import keys
from producers.frame import Frame
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.errors import StreamUnavailable
from workers.ledger import CameraLedger, ProductLedger, read_ledger
from workers.redis_stream import RedisStream
from workers.reports import read_replicas, remove_report, write_report
from workers.settings import WorkerSettings
from workers.stream import Entry, VerdictMessage


@pytest.fixture
def publisher(server):
    return Publisher(server, PublisherSettings())


@pytest.fixture
def stream(server):
    return RedisStream(server, "r", WorkerSettings())


def say(stream: RedisStream, entries: list[Entry], verdict: str, version: str) -> None:
    frames = [Frame.from_fields(entry.product, entry.fields) for entry in entries]
    stream.send_verdicts(
        [VerdictMessage(f.product, f.camera, f.seq, verdict, 0.5, 0.25, version, "", 1.0) for f in frames]
    )


def settle(stream: RedisStream, entries: list[Entry]) -> None:
    stream.settle([settlement(entry) for entry in entries])


def test_an_empty_server_has_an_empty_ledger(server):
    assert read_ledger(server) == []
    server.sadd(keys.PRODUCTS, "bolt")
    assert read_ledger(server) == [ProductLedger("bolt", 0, ())]


def test_every_station_of_a_frame_is_counted(server, publisher, stream):
    for seq in range(1, 7):
        publisher.publish(new_frame(seq, camera="cam-1"))
    publisher.publish(new_frame(1, camera="cam-2"))
    publisher.publish(new_frame(1, product="nut"))
    publisher.shed(new_frame(7, camera="cam-1"), "stopped", threading.Event())
    entries = [entry for entry in stream.read(6, 1) if entry.product == "bolt"]
    assert len(entries) == 3
    say(stream, entries[:2], "pass", "v1")
    settle(stream, entries[:1])
    stream.dead_letter(entries[2], "cam-1", "reason")
    bolt, nut = read_ledger(server)
    one, two = bolt.cameras
    counts = (one.captured, one.judged, one.shed, one.dead, one.in_flight)
    assert counts == (7, 1, 1, 1, 4)
    assert (one.model_version, one.last_verdict) == ("v1", "pass")
    assert (two.captured, two.in_flight, two.model_version, two.last_verdict) == (1, 1, "", "")
    assert (nut.product, nut.cameras[0].captured, nut.lag) == ("nut", 1, 0)
    assert bolt.lag == 4  # three of cam-1 and one of cam-2 that nobody has taken
    assert bolt.balanced
    assert nut.balanced


def test_the_oldest_frame_in_flight_has_its_age(server, publisher):
    old = Frame("bolt", "cam-1", 1, time.time_ns() - 3600 * 10**9, new_frame().picture)
    publisher.publish(old)
    publisher.publish(new_frame(2))
    publisher.publish(new_frame(1, camera="cam-2"))
    one, two = read_ledger(server)[0].cameras
    assert 3600 <= one.oldest_s < 3700
    assert 0 <= two.oldest_s < 100


def test_a_clock_ahead_of_ours_makes_no_negative_age(server, publisher):
    publisher.publish(Frame("bolt", "cam-1", 1, time.time_ns() + 3600 * 10**9, new_frame().picture))
    assert read_ledger(server)[0].cameras[0].oldest_s == 0.0


def test_the_rate_is_of_the_last_verdicts(server, publisher, stream):
    for seq in range(1, 31):
        publisher.publish(new_frame(seq, camera=f"cam-{seq % 2}"))
    say(stream, stream.read(30, 1), "fail", "v2")
    rates = [camera.frames_per_s for camera in read_ledger(server)[0].cameras]
    assert rates == [pytest.approx(rates[0])] * 2
    assert 0 < rates[0] <= 15  # 15 verdicts of each, over at least a second
    assert {camera.last_verdict for camera in read_ledger(server)[0].cameras} == {"fail"}


def test_a_frame_that_vanished_is_seen(server, publisher):
    publisher.publish(new_frame(1))
    server.zrem(keys.waiting("bolt"), "cam-1/1")
    (bolt,) = read_ledger(server)
    assert not bolt.balanced
    assert bolt.as_dict()["balanced"] is False


@pytest.mark.parametrize("name", ["captured", "judged", "shed", "dead", "lost", "in_flight"])
def test_the_balance_is_a_real_check(name):
    account = {"captured": 15, "judged": 4, "shed": 3, "dead": 1, "lost": 5, "in_flight": 2}
    account |= {"verdicts": {"pass": 2, "fail": 1, "unknown": 1, "late": 1}}
    assert CameraLedger("bolt", "cam-1", **account).balanced
    assert not CameraLedger("bolt", "cam-1", **account | {name: account[name] + 1}).balanced


def test_the_ledger_is_one_json_document(server, publisher):
    publisher.publish(new_frame(1))
    (bolt,) = read_ledger(server)
    document = json.loads(json.dumps(bolt.as_dict()))
    assert document["cameras"] == [asdict(bolt.cameras[0])]
    assert (document["product"], document["lag"], document["balanced"]) == ("bolt", 1, True)


def test_the_lag_is_what_nobody_has_taken(server, publisher, stream):
    for seq in range(1, 6):
        publisher.publish(new_frame(seq))
    assert read_ledger(server)[0].lag == 5
    entries = stream.read(2, 1)
    assert read_ledger(server)[0].lag == 3
    settle(stream, entries)
    assert read_ledger(server)[0].lag == 3


# --- what replicas say of themselves


def test_replicas_are_listed_while_they_report(server):
    assert read_replicas(server) == []
    for name in ("b", "a"):
        write_report(server, {"replica": name, "judged": 7, "versions": {"bolt": "v1"}, "trouble": None})
    a, b = read_replicas(server)
    assert (a["replica"], b["replica"]) == ("a", "b")
    assert a == {"replica": "a", "judged": 7, "versions": {"bolt": "v1"}, "trouble": None}
    assert 0 < server.ttl("replica:a") <= 10  # one that died is forgotten
    server.delete("replica:a")
    assert [each["replica"] for each in read_replicas(server)] == ["b"]
    remove_report(server, "b")
    assert read_replicas(server) == []
    assert server.dbsize() == 0


@pytest.mark.parametrize(
    "call",
    [
        read_ledger,
        read_replicas,
        lambda server: write_report(server, {"replica": "a"}),
        lambda server: remove_report(server, "a"),
    ],
    ids=["ledger", "replicas", "report", "remove"],
)
def test_a_server_that_is_gone_is_our_own_error(mortal, call):
    client = mortal.client()
    mortal.kill()
    with pytest.raises(StreamUnavailable, match=r"^Redis did not answer: "):
        call(client)
    client.close()
