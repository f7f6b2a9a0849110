"""Processes killed with SIGKILL, for real: every captured frame still ends in exactly one row."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import redis
from conftest import new_frame

from models.registry import Registry
from producers import keys
from producers.frame import Frame
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.engine import Engine
from workers.ledger import read_ledger
from workers.loop import InspectionLoop
from workers.places import Places
from workers.pointers import Pointers
from workers.reading import read_results
from workers.redis_stream import RedisStream
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.settings import WorkerSettings

SETTINGS = WorkerSettings(
    device="cpu", max_batch=4, batch_wait_ms=0.0, segment_ms=0.0, claim_idle_ms=100, max_deliveries=10
)

# Where a process dies: owner, method, and whether before or after the call. The second call, so that there is
# always something settled, something half done and something not yet taken.
MOMENTS = {
    "before the verdicts": ("stream", "send_verdicts", False),
    "after the verdicts": ("stream", "send_verdicts", True),
    "in mid-write": ("os", "fsync", False),
    "after the write": ("writer", "write", True),
    "after the acknowledgement": ("stream", "settle", True),
    "while nobody looks": None,
}


def inspect(places: Places, moment: str) -> None:
    """A process's whole life: inspect until the moment comes, or until somebody kills it."""
    server, registry = places.connect(), Registry(places.registry_uri)
    engine = Engine(registry, "cpu")
    residency = Residency(engine, Pointers(server, registry), poll_s=60.0)
    residency.start()
    stream = RedisStream(places.connect(), "victim", SETTINGS)
    writer = SegmentWriter(places.results_uri, "victim")
    if MOMENTS[moment] is not None:
        owner, method, after = MOMENTS[moment]
        die_at_second_call({"stream": stream, "writer": writer, "os": os}[owner], method, after)
    InspectionLoop(stream, engine, residency, writer, SETTINGS, replica="victim").run(threading.Event())


def die_at_second_call(owner: Any, method: str, after: bool) -> None:
    real: Callable[..., Any] = getattr(owner, method)
    calls = []

    def call(*args: Any) -> Any:
        calls.append(args)
        if len(calls) < 2:
            return real(*args)
        if after:
            real(*args)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, method, call)


def start(places: Places, moment: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers.loop", "workers.redis_stream"])  # torch is loaded once for all
    process = context.Process(target=inspect, args=(places, moment))
    process.start()
    return process


def finish(places: Places, server: redis.Redis, engine: Engine) -> None:
    """Inspect in this process until nothing is in flight."""
    residency = Residency(engine, Pointers(server, Registry(places.registry_uri)), poll_s=60.0)
    client = places.connect()
    stream = RedisStream(client, "heir", SETTINGS)
    loop = InspectionLoop(
        stream, engine, residency, SegmentWriter(places.results_uri, "heir"), SETTINGS, replica="heir"
    )
    while any(camera.in_flight for product in read_ledger(server) for camera in product.cameras):
        loop.tick()
    loop.drain()
    client.close()


def assert_each_once(places: Places, server: redis.Redis, frames: list[Frame]) -> None:
    rows = read_results(places.results_uri, columns=["frame_id", "verdict"]).to_pylist()
    assert Counter(row["frame_id"] for row in rows) == Counter(frame.frame_id for frame in frames)
    assert "unknown" not in {row["verdict"] for row in rows}
    for product in read_ledger(server):
        assert product.balanced
        assert product.lag == 0
        assert server.xlen(keys.frames(product.product)) == 0
        for camera in product.cameras:
            expected = sum(f.product == product.product and f.camera == camera.camera for f in frames)
            assert (camera.captured, camera.judged, camera.dead) == (expected, expected, 0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_process_loses_and_doubles_nothing(places, server, registry, versions, engine, moment):
    pointers = Pointers(server, registry)
    for card in (versions.bolt, versions.nut):
        pointers.promote(card.product, card.version)
    publisher = Publisher(server, PublisherSettings(max_in_flight=1000))
    frames = [
        new_frame(seq, product, camera)
        for seq in range(1, 41)
        for product, camera in (("bolt", "cam-1"), ("bolt", "cam-2"), ("nut", "cam-1"))
    ]
    for frame in frames:
        publisher.publish(frame)
    victim = start(places, moment)
    if MOMENTS[moment] is None:
        while not server.xread({keys.verdicts("bolt"): "0"}, block=1000):
            assert victim.is_alive()
        victim.kill()
    victim.join(timeout=60)
    assert victim.exitcode == -signal.SIGKILL
    left = {c.camera: c for p in read_ledger(server) for c in p.cameras if p.product == "bolt"}
    assert all(camera.balanced for camera in left.values())
    assert sum(camera.in_flight for camera in left.values()) > 0
    finish(places, server, engine)
    assert_each_once(places, server, frames)


def test_a_killed_server_loses_and_doubles_nothing(mortal, registry, versions, engine, tmp_path):
    """Redis dies in mid-stream and comes back with its data; producer and loop go on by themselves."""
    places = Places(mortal.url, registry.uri, str(tmp_path / "results"), "")
    client = mortal.client()
    publisher = Publisher(client, PublisherSettings(max_in_flight=16, retry_s=120.0))
    residency = Residency(engine, Pointers(client, registry), poll_s=60.0)
    inspector = places.connect()
    loop = InspectionLoop(
        RedisStream(inspector, "r", SETTINGS),
        engine,
        residency,
        SegmentWriter(places.results_uri, "r"),
        SETTINGS,
        replica="r",
    )
    stop = threading.Event()
    running = threading.Thread(target=loop.run, args=(stop,))
    running.start()
    frames = [new_frame(seq) for seq in range(1, 121)]
    for frame in frames:
        if frame.seq in (40, 80):
            mortal.kill()
            mortal.start()
        publisher.publish(frame)
    finish(places, client, engine)
    stop.set()
    running.join(timeout=60)
    assert not running.is_alive()
    assert_each_once(places, client, frames)
    client.close()
    inspector.close()
