"""Publishing against a real server: counted once, bounded, and patient with a server that goes away."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis
from conftest import WatchedStop, full, new_frame, wire

from producers import keys
from producers.camera import Camera
from producers.errors import FrameError, ServerUnavailable
from producers.frame import Frame
from producers.publisher import Published, Publisher
from producers.sequence import Sequence
from producers.settings import PublisherSettings
from workers.ledger import CameraLedger, read_ledger
from workers.places import Places

PATIENT = PublisherSettings(max_in_flight=2, retry_s=60.0)
HASTY = PublisherSettings(retry_s=0.1)


def account(server: redis.Redis, camera: str = "cam-1") -> CameraLedger:
    (product,) = read_ledger(server)
    assert product.balanced
    return next(each for each in product.cameras if each.camera == camera)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_a_frame_is_in_the_stream_in_the_ledger_and_in_flight(server):
    frame = new_frame(seq=9)
    assert Publisher(server, PATIENT).publish(frame) is Published.ADDED
    ((_, fields),) = server.xrange(keys.frames("bolt"))
    assert fields == wire(frame)
    assert Frame.from_fields("bolt", fields) == frame
    assert server.smembers(keys.PRODUCTS) == {b"bolt"}
    assert server.zrange(keys.waiting("bolt"), 0, -1, withscores=True) == [
        (b"cam-1/9", frame.captured_at_ns // 1_000_000)
    ]
    assert (account(server).captured, account(server).in_flight) == (1, 1)
    assert account(server).oldest_s < 60


def test_cameras_and_products_are_counted_apart(server):
    publisher = Publisher(server, PublisherSettings())
    for product, camera in [("bolt", "a"), ("bolt", "b"), ("nut", "a"), ("bolt", "a")]:
        publisher.publish(new_frame(publisher.last_seq(product, camera) + 1, product, camera))
    counted = {(p.product, c.camera): c.captured for p in read_ledger(server) for c in p.cameras}
    assert counted == {("bolt", "a"): 2, ("bolt", "b"): 1, ("nut", "a"): 1}
    assert publisher.last_seq("bolt", "a") == 2


def test_a_camera_publishes_all_its_frames_in_order(server, solar_cells):
    from producers.sources import FolderSource

    settings = PublisherSettings()
    source = FolderSource(solar_cells / "test" / "good", settings)
    publisher = Publisher(server, settings)
    frames = list(Camera("bolt", "cam-1", source).frames(Sequence(), threading.Event()))
    for frame in frames:
        publisher.publish(frame)
    entries = [Frame.from_fields("bolt", fields) for _, fields in server.xrange(keys.frames("bolt"))]
    assert entries == frames
    assert account(server).captured == len(source) == 147


def test_threads_may_share_a_publisher(server, pool):
    publisher = Publisher(server, PublisherSettings(max_in_flight=1000))

    def push(camera: str) -> None:
        for seq in range(1, 51):
            publisher.publish(new_frame(seq, camera=camera))

    list(pool.map(push, ["a", "b", "c", "d"]))
    assert server.xlen(keys.frames("bolt")) == 200
    assert [account(server, camera).captured for camera in "abcd"] == [50] * 4


# --- back-pressure


def fill(publisher: Publisher) -> None:
    for seq in (1, 2):
        assert publisher.publish(new_frame(seq)) is Published.ADDED


def test_a_full_stream_blocks_until_a_frame_is_settled(server, pool):
    publisher, stop = Publisher(server, PATIENT), WatchedStop()
    fill(publisher)
    publishing = pool.submit(publisher.publish, new_frame(3), stop)
    for _ in range(3):  # it looked again and again
        assert stop.waited_on.acquire(timeout=60)
    assert not publishing.done()
    assert account(server).captured == server.xlen(keys.frames("bolt")) == 2
    server.xtrim(keys.frames("bolt"), maxlen=1)  # as a settlement does
    assert publishing.result(timeout=60) is Published.ADDED
    assert server.hget(keys.ledger("bolt"), "cam-1:captured") == b"3"


def test_that_a_full_stream_makes_a_camera_wait_is_said_once_and_its_end_too(server, pool, monkeypatch):
    monkeypatch.setattr("producers.publisher._SAY_FULL_AFTER_S", 0.01)
    monkeypatch.setattr("producers.publisher._SAY_ROOM_BELOW_S", 0.001)
    said: list[str] = []
    publisher, stop = Publisher(server, PATIENT, said.append), WatchedStop()
    fill(publisher)
    assert not said
    publishing = pool.submit(publisher.publish, new_frame(3), stop)
    for _ in range(12):
        assert stop.waited_on.acquire(timeout=60)
    server.xtrim(keys.frames("bolt"), maxlen=1)
    assert publishing.result(timeout=60) is Published.ADDED
    assert [line.partition(",")[0] for line in said] == ["bolt's stream is full"]
    server.xtrim(keys.frames("bolt"), maxlen=0)
    for seq in (4, 5):
        publisher.publish(new_frame(seq))
    assert said[1:] == ["bolt's stream takes frames of cam-1 again"]


def test_a_full_stream_holds_up_no_other_product(server):
    publisher = Publisher(server, PATIENT)
    fill(publisher)
    assert publisher.publish(new_frame(1, product="nut")) is Published.ADDED


def test_a_frame_given_up_while_blocked_is_counted_as_shed(server, pool):
    publisher, stop = Publisher(server, PATIENT), WatchedStop()
    fill(publisher)
    publishing = pool.submit(publisher.publish, new_frame(3), stop)
    assert stop.waited_on.acquire(timeout=60)
    stop.set()
    assert publishing.result(timeout=60) is Published.SHED
    counts = account(server)
    assert (counts.captured, counts.shed, counts.in_flight) == (3, 1, 2)
    assert publisher.last_seq("bolt", "cam-1") == 3


# --- twice and by two


class LosingClient:
    """Loses the connection at one script call: before the server has it, or before its answer is back."""

    def __init__(self, client: redis.Redis, at: int, executed: bool) -> None:
        self._evalsha: Callable[..., object] = client.evalsha
        self._countdown, self._executed = at, executed
        client.evalsha = self.evalsha

    def evalsha(self, *args: object) -> object:
        self._countdown -= 1
        if self._countdown != 0:
            return self._evalsha(*args)
        if self._executed:
            self._evalsha(*args)
        raise redis.ConnectionError("connection lost")


def test_a_frame_published_twice_counts_once(server):
    frame = new_frame()
    for _ in range(2):
        assert Publisher(server, PATIENT).publish(frame) is Published.ADDED
    assert server.xlen(keys.frames("bolt")) == account(server).captured == 1


@pytest.mark.parametrize("executed", [False, True], ids=["request lost", "reply lost"])
def test_a_lost_connection_loses_and_doubles_nothing(server, executed):
    publisher = Publisher(server, PATIENT)
    assert publisher.publish(new_frame(1)) is Published.ADDED
    LosingClient(server, at=1, executed=executed)
    assert publisher.publish(new_frame(2)) is Published.ADDED
    assert server.xlen(keys.frames("bolt")) == account(server).captured == account(server).in_flight == 2


def test_what_redis_py_repeats_by_itself_counts_once(server, pool):
    def twice(*args: object, evalsha: Callable[..., object] = server.evalsha) -> object:
        evalsha(*args)
        return evalsha(*args)

    server.evalsha = twice
    publisher, stop = Publisher(server, PATIENT), WatchedStop()
    fill(publisher)
    publishing = pool.submit(publisher.publish, new_frame(3), stop)
    assert stop.waited_on.acquire(timeout=60)
    stop.set()
    assert publishing.result(timeout=60) is Published.SHED
    counts = account(server)
    assert (counts.captured, counts.shed, counts.in_flight) == (3, 1, 2)


@pytest.mark.parametrize("seq", [4, 5], ids=["older number", "same number"])
def test_a_second_producer_under_the_same_name_is_told(server, seq):
    Publisher(server, PATIENT).publish(new_frame(5))
    message = rf"bolt/cam-1/{seq} is not above seq 5.*another producer pushes as camera 'cam-1'"
    with pytest.raises(FrameError, match=message) as caught:
        Publisher(server, PATIENT).publish(new_frame(seq))
    assert "\n" not in str(caught.value)
    assert server.xlen(keys.frames("bolt")) == account(server).captured == 1


# --- a server that is not there


def test_a_killed_server_is_waited_for_and_then_named(mortal, pool):
    client = mortal.client()
    Publisher(client, HASTY).publish(new_frame(1))
    mortal.kill()
    with pytest.raises(ServerUnavailable, match=r"did not answer for \d+\.\d s, frame bolt/cam-1/2 was not") as caught:
        Publisher(client, HASTY).publish(new_frame(2))
    assert "\n" not in str(caught.value)
    with pytest.raises(ServerUnavailable, match="did not answer"):
        Publisher(client, HASTY).last_seq("bolt", "cam-1")
    client.close()


def test_a_restarted_server_is_found_again(mortal, pool):
    client, stop = mortal.client(), WatchedStop()
    publisher = Publisher(client, PATIENT)
    publisher.publish(new_frame(1))
    mortal.kill()
    publishing = pool.submit(publisher.publish, new_frame(2), stop)
    assert stop.waited_on.acquire(timeout=60)
    assert not publishing.done()
    mortal.start()
    assert publishing.result(timeout=60) is Published.ADDED
    assert account(client).captured == account(client).in_flight == 2
    client.close()


def test_stop_ends_the_wait_for_a_server(mortal):
    client, stop = mortal.client(), threading.Event()
    mortal.kill()
    stop.set()
    with pytest.raises(ServerUnavailable, match="bolt/cam-1/1 was not published"):
        Publisher(client, PublisherSettings(retry_s=1e6)).publish(new_frame(1), stop)
    client.close()


def test_a_server_that_lost_its_data_learns_the_products_anew(server):
    publisher = Publisher(server, PATIENT)
    publisher.publish(new_frame(1))
    server.flushall()
    publisher.publish(new_frame(2))
    assert server.smembers(keys.PRODUCTS) == {b"bolt"}
    assert account(server).captured == account(server).in_flight == 2  # what it forgot was sent again


def test_a_wrong_password_is_said_at_once(valkey):
    with Places(f"redis://:guess@127.0.0.1:{valkey.port}/0", "", "", "").connect() as stranger:
        with pytest.raises(ServerUnavailable, match=r"^Redis refuses the password: [^\n]*$"):
            Publisher(stranger, PATIENT).publish(new_frame())
        with pytest.raises(ServerUnavailable):
            Publisher(stranger, PATIENT).last_seq("bolt", "cam-1")


def test_a_full_server_refuses_the_frame_in_one_line(server):
    publisher = Publisher(server, PublisherSettings(retry_s=0.2))
    publisher.publish(new_frame(1))
    said = r"^Redis refused frames for [0-9.]+ s, frame bolt/cam-1/2 was not published: [^\n]*$"
    with full(server), pytest.raises(ServerUnavailable, match=said):
        publisher.publish(new_frame(2))
    assert publisher.publish(new_frame(2)) is Published.ADDED
    assert account(server).captured == 2


def test_the_last_number_of_a_camera(server):
    publisher = Publisher(server, PATIENT)
    assert publisher.last_seq("bolt", "cam-1") == 0
    first = replace(new_frame(), seq=Sequence().next())
    publisher.publish(first)
    assert Sequence(after=publisher.last_seq("bolt", "cam-1")).next() > first.seq
    with pytest.raises(FrameError, match="is not a valid name"):
        publisher.last_seq("Bolt", "cam-1")
