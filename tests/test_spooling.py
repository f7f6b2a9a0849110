"""Frames through a spool, with a real server that goes and comes back and producers that are killed."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis
from conftest import MortalServer, full, new_frame
from redis.backoff import NoBackoff
from redis.retry import Retry

from producers import keys
from producers.errors import FrameError, SpoolError
from producers.frame import Frame, Picture
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooled import Record
from producers.spooling import SpooledPublisher
from workers.ledger import CameraLedger, read_ledger

ROOT = Path(__file__).resolve().parents[1]
FOREVER_S = 60
RAW = Picture("raw", (32, 32, 3), bytes(32 * 32 * 3))


def account(server: redis.Redis) -> CameraLedger:
    (product,) = read_ledger(server)
    assert product.balanced
    (camera,) = product.cameras
    return camera


def arrived(server: redis.Redis) -> list[int]:
    return [int(fields[b"seq"]) for _, fields in server.xrange(keys.frames("bolt"))]


def hasty(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0))


def settings(**changed: object) -> PublisherSettings:
    return PublisherSettings.model_validate({"spool_after_s": 0.0, "retry_s": 0.2, "max_in_flight": 10_000} | changed)


class Lines:
    """What was said, and a signal when it was."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._more = threading.Semaphore(0)

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.said.append(line)
        self._more.release()

    def await_next(self) -> str:
        assert self._more.acquire(timeout=FOREVER_S)
        return self.said[-1]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def opened(folder):
    """Makes spooled publishers that end with the test."""
    made: list[SpooledPublisher] = []

    def open_one(url: str, max_bytes: int = 64 << 20, say: Lines | None = None, **changed: object) -> SpooledPublisher:
        chosen = settings(**changed)
        spool = Spool(folder, max_bytes, chosen.spool_fsync)
        made.append(SpooledPublisher("bolt", "cam-1", hasty(url), spool, chosen, say or Lines()))
        return made[-1]

    yield open_one
    for each in made:
        if not each.closed:
            each.close()


def drained(publisher: SpooledPublisher) -> bool:
    stop = threading.Event()
    timer = threading.Timer(FOREVER_S, stop.set)
    timer.start()
    try:
        return publisher.drain(stop)
    finally:
        timer.cancel()


def test_frames_go_directly_while_the_server_is_there(valkey, server, opened, folder):
    publisher = opened(valkey.url)
    assert [publisher.publish(new_frame(seq)) for seq in (1, 2, 3)] == [Published.ADDED] * 3
    assert list(folder.glob("*.seg")) == []
    assert publisher.counts().published == account(server).captured == 3
    with pytest.raises(FrameError, match="is no frame of bolt/cam-1"):
        publisher.publish(new_frame(1, product="nut"))


def test_an_outage_costs_nothing_and_keeps_the_order(mortal, opened):
    say = Lines()
    publisher = opened(mortal.url, say=say, retry_s=FOREVER_S)
    for seq in range(1, 4):
        assert publisher.publish(new_frame(seq)) is Published.ADDED
    mortal.kill()
    for seq in range(4, 30):
        assert publisher.publish(new_frame(seq)) is Published.SPOOLED
    mortal.start()
    seq = 30
    while publisher.publish(new_frame(seq)) is Published.SPOOLED:  # behind what is still spooled
        assert drained(publisher)
        seq += 1
    with mortal.client() as client:
        assert arrived(client) == list(range(1, seq + 1))
        counts = account(client)
    assert (counts.captured, counts.lost, counts.shed, counts.in_flight) == (seq, 0, 0, seq)
    assert len(say.said) == 2
    assert "frames go to the spool" in say.said[0]
    assert "Redis answers again" in say.said[1]
    done = publisher.counts()
    assert (done.published, done.spooled, done.waiting, done.shed) == (seq, done.replayed, 0, 0)


PRODUCER = """
import sys, threading, time
from pathlib import Path
import redis
from producers.frame import Frame, Picture
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooling import SpooledPublisher
server, spool = redis.Redis.from_url(sys.argv[1]), Spool(Path(sys.argv[2]), 1 << 26)
settings = PublisherSettings(spool_after_s=0, max_in_flight=10_000)
publisher = SpooledPublisher("bolt", "cam-1", server, spool, settings, lambda line: None)
picture = Picture("raw", (32, 32, 3), bytes(32 * 32 * 3))
for seq in range(int(sys.argv[3]), int(sys.argv[4]) + 1):
    print(publisher.publish(Frame("bolt", "cam-1", seq, time.time_ns(), picture)).value, flush=True)
print("done", flush=True)
threading.Event().wait()
"""


class Producer:
    """A producer in a process of its own."""

    def __init__(self, url: str, folder: Path, first: int, last: int) -> None:
        command = [sys.executable, "-c", PRODUCER, url, str(folder), str(first), str(last)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def said(self, word: str, times: int = 1) -> None:
        """Wait until it said the word so often."""
        assert self._process.stdout is not None
        while times:
            line = self._process.stdout.readline().strip()
            assert line
            times -= line == word

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.communicate(timeout=FOREVER_S)


def test_a_killed_producer_and_a_killed_server_lose_nothing(mortal, opened, folder):
    producer = Producer(mortal.url, folder, 101, 140)
    producer.said("added", times=40)
    producer.kill()
    mortal.kill()
    producer = Producer(mortal.url, folder, 5001, 5059)  # without a server from its first frame on
    producer.said("spooled", times=59)
    producer.kill()
    mortal.start()
    publisher = opened(mortal.url, retry_s=FOREVER_S)
    assert publisher.last_seq() == 5059
    for seq in range(9001, 9011):
        publisher.publish(new_frame(seq))
    assert drained(publisher)
    with mortal.client() as client:
        assert arrived(client) == [*range(101, 141), *range(5001, 5060), *range(9001, 9011)]
        counts = account(client)
    assert (counts.captured, counts.lost, counts.shed) == (109, 0, 0)
    assert publisher.counts().replayed >= 59


@pytest.mark.parametrize("moment", ["before the server has it", "before its answer is noted"])
def test_a_producer_killed_while_it_replays_doubles_nothing(valkey, server, opened, folder, moment):
    spooled(folder, 1, 10)
    publisher = Publisher(server, settings())
    publisher.begin_run("bolt", "cam-1", 1)
    for seq in range(1, 5 if moment.startswith("before the server") else 6):  # and the position says 0
        publisher.publish(new_frame(seq, picture=RAW))
    assert drained(opened(valkey.url))
    assert arrived(server) == list(range(1, 11))
    assert (account(server).captured, account(server).lost) == (10, 0)


def spooled(folder: Path, first: int, last: int, of_run: int | None = None) -> None:
    """A spool as a killed producer leaves it."""
    spool = Spool(folder, 64 << 20)
    for seq in range(first, last + 1):
        frame = new_frame(seq, picture=RAW)
        spool.append(Record(seq, of_run or first, frame.captured_at_ns, frame.picture))
    spool.close()


def test_a_damaged_record_is_counted_as_lost_and_nothing_else(valkey, server, opened, folder):
    spooled(folder, 1, 9)
    (path,) = folder.glob("*.seg")
    content = bytearray(path.read_bytes())
    content[4 * len(content) // 9 + 200] ^= 1
    path.write_bytes(content)
    publisher = opened(valkey.url)
    assert drained(publisher)
    assert arrived(server) == [1, 2, 3, 4, 6, 7, 8, 9]
    counts = account(server)
    assert (counts.captured, counts.lost, counts.in_flight) == (9, 1, 8)
    ((_, gap),) = server.xrange(keys.gaps("bolt"))
    assert (gap[b"camera"], gap[b"first"], gap[b"last"]) == (b"cam-1", b"5", b"5")
    assert publisher.counts().lost == 1


def test_a_damaged_end_of_a_run_is_lost_too(valkey, server, opened, folder):
    spooled(folder, 1, 3)
    (path,) = folder.glob("*.seg")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    publisher = opened(valkey.url)
    publisher.publish(new_frame(1 << 30))
    assert drained(publisher)
    assert arrived(server) == [1, 2, 1 << 30]
    assert (account(server).captured, account(server).lost) == (4, 1)


# --- a full spool


def overflown(
    mortal: MortalServer, opened, policy: str, frames: int
) -> tuple[list[Published], CameraLedger, list[int]]:
    """Push more than fits while the server is away, then let it come back."""
    publisher = opened(mortal.url, max_bytes=16 * 3200, policy=policy, retry_s=FOREVER_S)
    mortal.kill()
    published = [publisher.publish(new_frame(seq, picture=RAW)) for seq in range(1, frames + 1)]
    mortal.start()
    assert drained(publisher)
    with mortal.client() as client:
        ledger, numbers = account(client), arrived(client)
        for _, fields in client.xrange(keys.verdicts("bolt")):
            assert fields[b"verdict"] == b"unknown"
    assert publisher.counts().shed == ledger.shed
    assert publisher.counts().published == len(numbers)
    return published, ledger, numbers


def test_drop_newest_gives_up_what_does_not_fit(mortal, opened):
    published, ledger, numbers = overflown(mortal, opened, "drop_newest", 20)
    assert published == [Published.SPOOLED] * 16 + [Published.SHED] * 4
    assert numbers == list(range(1, 17))
    assert (ledger.captured, ledger.shed_by, ledger.lost) == (20, {"drop_newest spool": 4}, 0)


def test_drop_oldest_gives_up_what_came_first(mortal, opened):
    published, ledger, numbers = overflown(mortal, opened, "drop_oldest", 30)
    assert published == [Published.SPOOLED] * 30
    assert numbers == list(range(30 - len(numbers) + 1, 31))
    assert 10 <= len(numbers) <= 16
    assert (ledger.captured, ledger.shed_by, ledger.lost) == (
        30,
        {"drop_oldest spool": 30 - len(numbers)},
        0,
    )


def test_block_waits_until_the_server_took_some(mortal, opened):
    publisher = opened(mortal.url, max_bytes=4 * 3200, retry_s=FOREVER_S)
    mortal.kill()
    for seq in range(1, 5):
        assert publisher.publish(new_frame(seq, picture=RAW)) is Published.SPOOLED
    stop = WatchedStop()
    pushing = threading.Thread(target=publisher.publish, args=(new_frame(5, picture=RAW), stop))
    pushing.start()
    assert stop.waited_on.wait(FOREVER_S)
    mortal.start()
    pushing.join(FOREVER_S)
    assert not pushing.is_alive()
    assert drained(publisher)
    with mortal.client() as client:
        assert arrived(client) == [1, 2, 3, 4, 5]
        assert account(client).shed == 0


class WatchedStop(threading.Event):
    """Tells when somebody waits on it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_on = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_on.set()
        return super().wait(timeout)


def test_a_blocked_frame_is_counted_when_the_push_is_ended(mortal, opened):
    publisher = opened(mortal.url, max_bytes=4 * 3200, retry_s=FOREVER_S)
    mortal.kill()
    stop = threading.Event()
    stop.set()
    published = [publisher.publish(new_frame(seq, picture=RAW), stop) for seq in range(1, 6)]
    assert published == [Published.SPOOLED] * 4 + [Published.SHED]
    mortal.start()
    assert drained(publisher)
    with mortal.client() as client:
        assert account(client).shed_by == {"stopped while full": 1}


def test_replay_keeps_to_the_bounds_of_the_stream(valkey, server, opened, folder):
    spooled(folder, 1, 6)
    publisher = opened(valkey.url, max_in_flight=4)
    while server.xlen(keys.frames("bolt")) < 4:
        assert not publisher.drain(ended())
    assert publisher.counts().waiting == 2
    publisher.close()  # what waits stays, and is not shed
    assert account(server).shed == 0
    server.delete(keys.frames("bolt"))
    assert drained(opened(valkey.url, max_in_flight=4))
    assert (account(server).captured, account(server).lost) == (6, 0)


def ended() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


def test_what_cannot_be_sent_stays(mortal, opened, folder):
    publisher = opened(mortal.url, retry_s=0.0)
    mortal.kill()
    publisher.publish(new_frame(1))
    assert not drained(publisher)
    publisher.close()
    mortal.start()
    assert drained(opened(mortal.url, retry_s=FOREVER_S))
    with mortal.client() as client:
        assert arrived(client) == [1]


# --- other people and other disks


def test_a_second_producer_on_the_same_spool_is_told(valkey, server, opened):
    opened(valkey.url)
    with pytest.raises(SpoolError, match="another producer uses the spool"):
        opened(valkey.url)


def test_a_spool_whose_numbers_another_producer_has_passed_is_not_dropped(valkey, server, opened, folder):
    spooled(folder, 1, 3)
    Publisher(server, settings()).publish(new_frame(50))
    publisher = opened(valkey.url)
    with pytest.raises(FrameError, match=r"another producer pushes as camera 'cam-1'.*remove that folder$"):
        drained(publisher)
    with pytest.raises(FrameError, match="another producer"):
        publisher.publish(new_frame(60))
    assert publisher.counts().waiting == 3


def test_a_number_between_two_runs_of_the_spool_is_another_producers(valkey, server, opened, folder):
    spooled(folder, 1, 3)
    spooled(folder, 100, 103)
    Publisher(server, settings()).publish(new_frame(50))
    with pytest.raises(FrameError, match="another producer pushes"):
        drained(opened(valkey.url))
    assert arrived(server) == [50]


def test_numbers_that_go_back_are_refused_while_they_could_not_be_told_apart(mortal, opened):
    publisher = opened(mortal.url)
    mortal.kill()
    publisher.publish(new_frame(5))
    with pytest.raises(FrameError, match=r"bolt/cam-1/4 is not above seq 5, the last in the spool"):
        publisher.publish(new_frame(4))
    assert publisher.counts().waiting == 1


def test_a_lost_position_doubles_nothing(valkey, server, opened, folder):
    spooled(folder, 1, 10)
    publisher = opened(valkey.url, max_in_flight=4)
    while publisher.counts().replayed < 4:
        assert not publisher.drain(ended())
    publisher.close()
    (folder / "position").unlink()
    assert drained(opened(valkey.url))
    assert arrived(server) == list(range(1, 11))
    assert (account(server).captured, account(server).lost) == (10, 0)


def test_what_is_lost_is_counted_on_a_server_without_memory(valkey, server, opened, folder):
    spooled(folder, 1, 1)
    (path,) = folder.glob("*.seg")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with full(server):
        assert drained(opened(valkey.url, policy="drop_newest"))
    Publisher(server, settings()).publish(new_frame(2))  # only now readers can be told of the product
    assert (account(server).captured, account(server).lost, account(server).shed) == (2, 1, 0)


def test_a_product_of_which_everything_was_shed_is_known(valkey, server, opened, folder):
    spool = Spool(folder, 1 << 20)
    spool.note(Record(1, 1, 10**18, None, "drop_newest spool"))
    spool.close()
    assert drained(opened(valkey.url))
    assert account(server).shed_by == {"drop_newest spool": 1}


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest", "block"])
def test_a_full_disk_is_said_once_and_its_frames_are_counted(mortal, opened, folder, policy):
    say = Lines()
    publisher = opened(mortal.url, say=say, policy=policy, retry_s=FOREVER_S)
    mortal.kill()
    publisher.publish(new_frame(1, picture=RAW))
    stop, limits = ended(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        published = [publisher.publish(new_frame(seq, picture=RAW), stop) for seq in range(2, 6)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert published == [Published.SHED] * 4
    assert [line for line in say.said if "File too large" in line] == [say.said[-1]]
    publisher.publish(new_frame(6, picture=RAW))
    mortal.start()
    assert drained(publisher)
    with mortal.client() as client:
        assert arrived(client) == [1, 6]
        reason = "stopped while full" if policy == "block" else f"{policy} disk"
        assert account(client).shed_by == {reason: 4}
        assert account(client).lost == 0


def test_a_server_without_memory_sends_frames_to_the_spool(valkey, server, opened):
    publisher = opened(valkey.url, retry_s=FOREVER_S)
    publisher.publish(new_frame(1))
    with full(server):
        # the guard of the publisher looks twice a second; either way nothing is lost
        assert publisher.publish(new_frame(2), ended()) in (Published.SPOOLED, Published.SHED)
    assert drained(publisher)
    counts = account(server)
    assert (counts.captured, counts.lost) == (2, 0)


def test_the_frame_survives_its_way_through_the_spool(valkey, server, opened, folder):
    frame = new_frame(7)
    spool = Spool(folder, 1 << 20)
    spool.append(Record(7, 7, frame.captured_at_ns, frame.picture))
    spool.close()
    assert drained(opened(valkey.url))
    ((_, fields),) = server.xrange(keys.frames("bolt"))
    assert Frame.from_fields("bolt", fields) == frame
