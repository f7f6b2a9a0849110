"""What a power cut may take with it: a server that comes back without the end of its append-only file."""

import os
from pathlib import Path

import pytest
from conftest import new_frame

from producers import keys
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.ledger import CameraLedger, read_ledger


def newest_file(home: Path) -> Path:
    return max((home / "appendonlydir").glob("*.incr.aof"), key=lambda file: file.stat().st_mtime_ns)


def account(server) -> CameraLedger:
    (product,) = read_ledger(server)
    assert product.balanced
    return product.cameras[0]


def cut_power(mortal, kept_bytes: int) -> None:
    """Kill the server and cut off what its file system had not written yet."""
    mortal.kill()
    os.truncate(newest_file(mortal.home), kept_bytes)
    mortal.start()


@pytest.fixture
def line(mortal):
    """A server with five frames in its file, the size of that, and five more that it has confirmed."""
    client = mortal.client()

    def prepared(**settings) -> tuple:
        publisher = Publisher(client, PublisherSettings(retry_s=60.0, **settings))
        for seq in range(1, 6):
            publisher.publish(new_frame(seq))
        size = newest_file(mortal.home).stat().st_size
        for seq in range(6, 11):
            publisher.publish(new_frame(seq))
        return publisher, client, size

    yield prepared
    client.close()


@pytest.mark.parametrize("torn_bytes", [0, 100], ids=["between two frames", "within a frame"])
def test_the_publisher_sends_the_last_second_again(mortal, line, torn_bytes):
    """`everysec`, the default: the server forgets what it confirmed, and nothing is lost while its camera runs."""
    publisher, client, size = line()
    cut_power(mortal, size + torn_bytes)
    assert account(client).captured == 5
    publisher.publish(new_frame(11))
    counts = account(client)
    assert (counts.captured, counts.lost, counts.in_flight) == (11, 0, 11)
    frames = [int(fields[b"seq"]) for _, fields in client.xrange(keys.frames("bolt"))]
    assert frames == list(range(1, 12))


def test_what_nobody_can_send_again_is_counted_with_its_range(mortal, line):
    """The same without retention: each lost frame is a gap in the numbers."""
    publisher, client, size = line(retain_s=0)
    cut_power(mortal, size)
    publisher.publish(new_frame(11))
    counts = account(client)
    assert (counts.captured, counts.lost, counts.in_flight) == (11, 5, 6)
    ((_, gap),) = client.xrange(keys.gaps("bolt"))
    assert (gap[b"camera"], gap[b"first"], gap[b"last"]) == (b"cam-1", b"6", b"10")


@pytest.mark.parametrize("mortal", ["everysec", "always"], indirect=True)
def test_a_killed_server_forgets_nothing_that_it_confirmed(mortal, line):
    """SIGKILL is no power cut: what was written stays with the operating system, by either policy."""
    publisher, client, _ = line(retain_s=0)
    mortal.kill()
    mortal.start()
    publisher.publish(new_frame(11))
    counts = account(client)
    assert (counts.captured, counts.lost, counts.in_flight) == (11, 0, 11)
