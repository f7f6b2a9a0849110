"""Consumers that left without a word are removed, but never one that holds entries or may come back to some."""

import time

import pytest
import redis
from conftest import new_frame, settlement
from redis_servers import until

from producers import keys
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.consumers import IdleConsumers
from workers.ledger import read_ledger
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings

LONG_MS = 40


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def idle_consumers(server, clock):
    made = IdleConsumers(server, "me", LONG_MS, clock)
    clock.now_s = 60.0
    return made


def publish(server: redis.Redis, *products: str) -> None:
    for seq, product in enumerate(products, 1):
        Publisher(server, PublisherSettings()).publish(new_frame(seq, product))


def consumers(server: redis.Redis, product: str = "bolt") -> dict[bytes, dict]:
    return {each["name"]: each for each in server.xinfo_consumers(keys.frames(product), keys.GROUP)}


def wait_until_idle(server: redis.Redis, product: str = "bolt") -> None:
    until(lambda: all(each["idle"] > LONG_MS for each in consumers(server, product).values()), "all are idle")


def test_a_silent_consumer_without_entries_is_removed(server, idle_consumers):
    publish(server, "bolt", "nut")
    gone = RedisStream(server, "gone", WorkerSettings())
    for entry in gone.read(8, 1):
        gone.settle([settlement(entry)])
    RedisStream(server, "me", WorkerSettings()).read(8, 0)
    wait_until_idle(server)
    wait_until_idle(server, "nut")
    assert idle_consumers.remove(["bolt", "nut", "unknown"]) == 2
    assert set(consumers(server)) == set(consumers(server, "nut")) == {b"me"}


def test_one_that_holds_entries_stays_until_they_are_claimed(server, idle_consumers, clock):
    publish(server, "bolt")
    (entry,) = RedisStream(server, "killed", WorkerSettings()).read(8, 1)
    wait_until_idle(server)
    assert idle_consumers.remove(["bolt"]) == 0
    server.xclaim(keys.frames("bolt"), keys.GROUP, "me", 0, [entry.id])
    clock.now_s += 60.0
    assert idle_consumers.remove(["bolt"]) == 1
    assert {name: each["pending"] for name, each in consumers(server).items()} == {b"me": 1}
    assert read_ledger(server)[0].balanced


def test_one_that_reads_is_not_silent_though_nothing_comes(server):
    publish(server, "bolt")
    other = RedisStream(server, "other", WorkerSettings())
    (entry,) = other.read(8, 1)
    other.settle([settlement(entry)])
    wait_until_idle(server)
    started = time.monotonic()
    other.read(8, 0)
    assert consumers(server)[b"other"]["idle"] <= (time.monotonic() - started) * 1000 + 1


def test_it_looks_once_a_minute(server, idle_consumers, clock):
    publish(server, "bolt")
    gone = RedisStream(server, "gone", WorkerSettings())
    (entry,) = gone.read(8, 1)
    assert idle_consumers.remove(["bolt"]) == 0
    gone.settle([settlement(entry)])
    wait_until_idle(server)
    clock.now_s += 59.9
    assert idle_consumers.remove(["bolt"]) == 0
    clock.now_s += 0.2
    assert idle_consumers.remove(["bolt"]) == 1


def test_recovering_removes_them(server, monkeypatch):
    publish(server, "bolt")
    gone = RedisStream(server, "gone", WorkerSettings())
    (entry,) = gone.read(8, 1)
    gone.settle([settlement(entry)])
    me = RedisStream(server, "me", WorkerSettings(consumer_idle_ms=1000))
    me.read(8, 0)
    monkeypatch.setattr(me, "_idle_consumers", IdleConsumers(server, "me", LONG_MS, iter([0.0, 61.0, 61.0]).__next__))
    wait_until_idle(server)
    assert me.recover([], 8) == []
    assert set(consumers(server)) == {b"me"}
