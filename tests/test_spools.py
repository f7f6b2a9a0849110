"""The spools below a home: where they are, and that a camera follows an application that starts anew elsewhere."""

import os
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from conftest import MortalServer, new_frame
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster import connection as connection_module
from cluster.config import ProctorConfig
from cluster.doctor import _spools
from cluster.run_state import RunState
from cluster.spools import replay_spools, spooled_publisher, waiting_spools
from producers import keys
from producers.frame import Frame
from producers.publisher import Published
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooled import Record
from workers.ledger import read_ledger


@pytest.fixture
def config(tmp_path) -> ProctorConfig:
    return ProctorConfig(home=tmp_path, publish=PublisherSettings(spool_after_s=0, max_in_flight=1000))


def runs_at(config: ProctorConfig, url: str) -> redis.Redis:
    """This process is the application, and its server is there."""
    RunState(os.getpid(), psutil.Process().create_time(), url, "local", "").write(config.home)
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0))


def left(config: ProctorConfig, frames: list[Frame]) -> None:
    """Spools as killed producers leave them."""
    for frame in frames:
        spool = Spool(config.home / "spool" / frame.product / frame.camera, 1 << 20)
        spool.append(Record(frame.seq, 1, frame.captured_at_ns, frame.picture))
        spool.close()


def numbers(server: redis.Redis, product: str) -> list[tuple[bytes, int]]:
    return [(fields[b"camera"], int(fields[b"seq"])) for _, fields in server.xrange(keys.frames(product))]


def test_a_camera_follows_an_application_that_starts_anew_elsewhere(config, mortal: MortalServer, valkey, server):
    said: list[str] = []
    first = runs_at(config, mortal.url)
    with spooled_publisher(config, "bolt", "cam-1", first, said.append) as publisher:
        assert publisher.publish(new_frame(1)) is Published.ADDED
        mortal.kill()
        RunState.remove(config.home)
        assert publisher.publish(new_frame(2)) is Published.SPOOLED
        runs_at(config, valkey.url).close()
        assert publisher.drain(threading.Event())
        assert publisher.publish(new_frame(3)) is Published.ADDED
    assert [seq for _, seq in numbers(server, "bolt")] == [1, 2, 3]  # the new server lacked 1, which was still retained
    (product,) = read_ledger(server)
    assert product.balanced
    assert len(said) == 2
    first.close()


class Loading(socketserver.StreamRequestHandler):
    """A server that reads its data: it greets and answers INFO, and says LOADING to whoever wants a key."""

    def handle(self) -> None:
        while head := self.rfile.readline():
            words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2).strip() for _ in range(int(head[1:]))]
            if words[0] == b"EXISTS":
                self.server.asked.set()
            answers = {
                b"INFO": b"$19\r\nredis_version:8.0.0\r\n",
                b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
                b"CLIENT": b"+OK\r\n",
            }
            self.wfile.write(answers.get(words[0], b"-LOADING the dataset is in memory soon\r\n"))


@pytest.fixture
def loading() -> Iterator[socketserver.ThreadingTCPServer]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Loading) as listening:
        listening.daemon_threads, listening.block_on_close, listening.asked = True, False, threading.Event()
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


def test_a_push_ends_at_once_though_the_new_address_still_reads_its_data(config, mortal, loading, monkeypatch):
    monkeypatch.setattr(connection_module, "LOADING_PATIENCE_S", 8)
    first = runs_at(config, mortal.url)
    mortal.kill()
    with spooled_publisher(config, "bolt", "cam-1", first, lambda _: None) as publisher:
        runs_at(config, f"redis://127.0.0.1:{loading.server_address[1]}/0").close()
        assert publisher.publish(new_frame(1)) is Published.SPOOLED
        assert loading.asked.wait(timeout=10)
        began_at = time.monotonic()
    assert time.monotonic() - began_at < 4
    assert publisher.counts().waiting == 1
    first.close()


def test_a_replay_sends_every_spool_or_the_chosen_ones(config, valkey, server):
    frames = [new_frame(1, product, camera) for product in ("bolt", "nut") for camera in ("a", "b")]
    left(config, frames)
    client, stop, said = runs_at(config, valkey.url), threading.Event(), []
    chosen = replay_spools(config, client, ("bolt", "b"), stop, said.append)
    assert [(each.product, each.camera, each.replayed, each.waiting) for each in chosen] == [("bolt", "b", 1, 0)]
    rest = replay_spools(config, client, (None, None), stop, said.append)
    assert [(each.product, each.camera, each.replayed) for each in rest] == [
        ("bolt", "a", 1),
        ("nut", "a", 1),
        ("nut", "b", 1),
    ]
    assert numbers(server, "bolt") == [(b"b", 1), (b"a", 1)]
    assert replay_spools(config, client, (None, None), stop, said.append) == []
    assert said == []
    client.close()


def test_doctor_names_what_waits_and_nothing_once_it_is_sent(config, valkey, server):
    assert waiting_spools(config) == []
    left(config, [new_frame(1), new_frame(1, camera="cam-2")])
    assert [finding.what for finding in _spools(config)] == ["spool bolt/cam-1", "spool bolt/cam-2"]
    client = runs_at(config, valkey.url)
    replay_spools(config, client, (None, None), threading.Event(), lambda line: None)
    client.close()
    assert list(_spools(config)) == []


def test_a_spool_in_use_stops_no_other(config, valkey, server):
    left(config, [new_frame(1, "bolt", "a"), new_frame(1, "bolt", "b")])
    holder = Spool(Path(config.home / "spool" / "bolt" / "a"), 1 << 20)
    with runs_at(config, valkey.url) as client:
        held, sent = replay_spools(config, client, (None, None), threading.Event(), lambda _: None)
    assert held.line().startswith("bolt/a: another producer uses the spool")
    assert sent.line() == "bolt/b: 1 frames sent"
    holder.close()
