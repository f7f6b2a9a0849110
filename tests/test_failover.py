"""A master that dies, is demoted or still loads, with real servers: cameras and workers go on by themselves."""

import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import redis
from conftest import WatchedStop, new_frame, settlement
from redis_servers import PASSWORD, SERVICE, Node, answers, free_port, launch, replicated, until
from rich.console import Console

from cluster.connection import connect
from cluster.errors import ServerError
from cluster.status import show_live
from cluster.training import wait_for
from producers import keys
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from workers.errors import StreamUnavailable
from workers.jobs import Job, Jobs
from workers.ledger import read_ledger
from workers.places import Places
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings

PATIENT = PublisherSettings(retry_s=60.0, max_in_flight=10_000)
WORKER = WorkerSettings(claim_idle_ms=1000, max_deliveries=100)


@pytest.fixture
def pair(tmp_path):
    with replicated(tmp_path) as started:
        yield started


@pytest.fixture
def nodes():
    """Servers that the test starts, ended after it."""
    started: list[Node] = []
    yield started
    for node in started:
        node.stop()


class Reader:
    """Reads and settles until told to stop, as a replica does; what fails is tried again."""

    def __init__(self, server: redis.Redis) -> None:
        self.seen: set[int] = set()
        self.failures = 0
        self._stream = RedisStream(server, "reader", WORKER)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        held = []
        while not self._stop.is_set():
            try:
                held += self._stream.read(16, 20)
                held += self._stream.recover(held, 16)
                self.seen |= {int(entry.fields[b"seq"]) for entry in held}
                self._stream.settle([settlement(entry) for entry in held])
                held = []
            except StreamUnavailable:
                self.failures += 1
                self._stop.wait(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_a_killed_master_costs_no_frame_that_a_replica_had(pair):
    camera, worker = connect(pair.url), Places(pair.url, "", "", "").connect()
    publisher, reader = Publisher(camera, PATIENT), Reader(worker)
    replicated_seqs, total = set(), 400
    for seq in range(1, total + 1):
        if seq == total // 2:
            pair.master.kill()
        assert publisher.publish(new_frame(seq)) is Published.ADDED
        if camera.execute_command("WAIT", 1 if seq < total // 2 else 0, 1000) >= (seq < total // 2):
            replicated_seqs.add(seq)
    until(lambda: replicated_seqs <= reader.seen, "every acknowledged frame is read")
    until(lambda: read_ledger(camera)[0].cameras[0].in_flight == 0, "every frame is settled")
    reader.stop()
    (product,) = read_ledger(camera)
    assert product.balanced
    assert total - 1 <= product.cameras[0].captured <= total  # the one before the kill was not waited for
    assert product.cameras[0].judged == product.cameras[0].captured
    assert reader.failures > 0
    with pair.replica.client() as promoted:
        assert promoted.info("replication")["role"] == "master"
    camera.close()
    worker.close()


def test_sentinels_that_know_no_such_master_or_are_away_are_named(pair):
    with pytest.raises(ServerError, match=r"know no master 'other' that is up: correct the service"):
        connect(pair.url.replace(SERVICE, "other"))
    with pytest.raises(ServerError, match=r"no sentinel of redis\+sentinel://127\.0\.0\.1:\d+/x answers"):
        connect(f"redis+sentinel://127.0.0.1:{free_port()}/x")
    with pytest.raises(ServerError, match=r"redis\+sentinel://.*/line-1 refuses the user or password") as caught:
        connect(pair.url.replace(PASSWORD, "guess"))
    assert "guess" not in str(caught.value)


def test_a_demoted_master_is_waited_for_by_cameras_workers_and_the_trainer(tmp_path, nodes):
    node = launch(tmp_path, free_port(), f'requirepass {PASSWORD}\nsave ""')
    url = f"redis://:{PASSWORD}@127.0.0.1:{node.port}/0"
    nodes.append(node)
    until(lambda: answers(node), "it answers")
    camera, worker, stop = connect(url), Places(url, "", "", "").connect(), WatchedStop()
    publisher, stream = Publisher(camera, PATIENT), RedisStream(worker, "me", WORKER)
    publisher.publish(new_frame(1))
    (entry,) = stream.read(4, 1)
    settled = [settlement(entry)]
    with node.client() as admin, ThreadPoolExecutor(1) as pool:
        admin.execute_command("REPLICAOF", "127.0.0.1", free_port())
        publishing = pool.submit(publisher.publish, new_frame(2), stop)
        assert stop.waited_on.acquire(timeout=20)
        with pytest.raises(StreamUnavailable):
            stream.settle(settled)
        with pytest.raises(StreamUnavailable):
            Jobs(worker).take(0.01)
        admin.execute_command("SCRIPT", "FLUSH")  # as on a server that has just taken over
        admin.execute_command("REPLICAOF", "NO", "ONE")
        assert publishing.result(timeout=20) is Published.ADDED
    stream.settle(settled)
    assert Jobs(worker).submit(Job(product="bolt")).id == Jobs(worker).take(1.0).id
    assert read_ledger(camera)[0].cameras[0].judged == 1
    camera.close()
    worker.close()


def test_a_server_that_still_reads_its_data_is_waited_for(tmp_path, nodes):
    port = free_port()
    first = launch(tmp_path, port, f"requirepass {PASSWORD}")
    nodes.append(first)
    until(lambda: answers(first), "it answers")
    with first.client() as client:
        client.mset({f"key-{number}": os.urandom(4096) for number in range(100)})
        client.save()
    first.kill()
    slow = launch(
        tmp_path, port, f"requirepass {PASSWORD}\nkey-load-delay 20000\nloading-process-events-interval-bytes 1024"
    )
    nodes.append(slow)
    with slow.client() as client:
        until(lambda: client.info("persistence")["loading"] == 1, "it reads its data")
        with pytest.raises(redis.BusyLoadingError):
            client.get("key-1")
    url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
    camera = Places(url, "", "", "").connect()
    assert Publisher(camera, PublisherSettings(retry_s=0.2)).publish(new_frame(1)) is Published.ADDED
    with connect(url) as client:
        assert client.dbsize() >= 100
        assert client.xlen(keys.frames("bolt")) == 1
    camera.close()


def test_commands_that_watch_outlast_a_server_that_is_away(mortal):
    job = Jobs(mortal.client()).submit(Job(product="bolt"))
    jobs = Jobs(mortal.client())
    output = io.StringIO()
    with connect(mortal.url) as watched, ThreadPoolExecutor(2) as pool:
        waits = iter(range(1000))

        def wait(_: float) -> bool:
            number = next(waits)
            if number == 1:
                mortal.kill()
            if number == 2:
                mortal.start()
            return number == 3

        console = Console(file=output, force_terminal=True, width=160)
        following = pool.submit(wait_for, jobs, job, Console(file=io.StringIO()))
        show_live(watched, console, wait)
        Jobs(watched).update(job.model_copy(update={"state": "succeeded"}))
        assert following.result(timeout=30).state == "succeeded"
    assert "as it was before: Redis did not answer" in output.getvalue()


def test_a_product_is_announced_again_after_a_minute(server, monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    steady = SimpleNamespace(monotonic=lambda: clock.now_s, time_ns=time.time_ns)
    monkeypatch.setattr("producers.publisher.time", steady)
    publisher = Publisher(server, PATIENT)
    publisher.publish(new_frame(1))
    server.delete(keys.PRODUCTS)  # as a node that failed over without them
    publisher.publish(new_frame(2))
    assert server.smembers(keys.PRODUCTS) == set()
    clock.now_s = 60.0
    publisher.publish(new_frame(3))
    assert server.smembers(keys.PRODUCTS) == {b"bolt"}
