"""The faults: each takes the line and a generator, does its harm, and leaves the line able to go on."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.line import PRODUCTS, Line
from producers import keys

Fault = Callable[[Line, random.Random], str]
_STOPPED_S = (0.5, 4.0)  # longer than after what time entries are taken over


def kill_producer(line: Line, chance: random.Random) -> str:
    """SIGKILL a producer; it starts anew where server and spool say."""
    return _kill(line, "producer", chance)


def kill_replica(line: Line, chance: random.Random) -> str:
    """SIGKILL a replica in the middle of whatever it does."""
    return _kill(line, "replica", chance)


def kill_compactor(line: Line, chance: random.Random) -> str:
    """SIGKILL the compactor in the middle of whatever it does."""
    return _kill(line, "compactor", chance)


def kill_server(line: Line, chance: random.Random) -> str:
    """SIGKILL the server; it starts anew on its append-only file."""
    line.restart_server()
    return "server"


def stop_replica(line: Line, chance: random.Random) -> str:
    """SIGSTOP a replica, so long that others may take its frames over, then let it go on."""
    return _stopped(line, "replica", chance)


def stop_producer(line: Line, chance: random.Random) -> str:
    """SIGSTOP a producer for a while."""
    return _stopped(line, "producer", chance)


def fill_disk(line: Line, chance: random.Random) -> str:
    """Fill the file system of the results, hold it full, then free it."""
    filler = line.results / ".filler"
    written = 0
    try:
        with filler.open("wb", buffering=0) as file:
            while written < 2**30:
                written += file.write(bytes(2**16))
    except OSError:
        pass
    time.sleep(chance.uniform(0.5, 2.0))
    filler.unlink(missing_ok=True)
    return f"{written >> 20} MB"


def cut_connections(line: Line, chance: random.Random) -> str:
    """Close every connection to the server."""
    return f"{line.proxy.cut()} connections"


def hold_connections(line: Line, chance: random.Random) -> str:
    """Let nothing through to the server for a while, without closing a connection."""
    seconds = chance.uniform(0.2, 3.0)
    line.proxy.hold()
    time.sleep(seconds)
    line.proxy.release()
    return f"{seconds:.1f} s"


def malformed_entries(line: Line, chance: random.Random) -> str:
    """Put entries into the streams that are no frames."""
    server = line.client()
    for _ in range(10):
        fields: Any = {bytes(chance.randbytes(4)): chance.randbytes(chance.randrange(200)) for _ in range(3)}
        fields |= chance.choice(
            [{}, {b"v": b"1"}, {b"v": b"9", b"camera": b"left", b"seq": b"1"}, {b"camera": b"\xff"}]
        )
        server.xadd(keys.frames(chance.choice(PRODUCTS)), fields)
    server.close()
    return "10 entries"


def _kill(line: Line, role: str, chance: random.Random) -> str:
    member = chance.choice(line.of(role) or line.members)
    member.signal(signal.SIGKILL)
    return member.name


def _stopped(line: Line, role: str, chance: random.Random) -> str:
    member, seconds = chance.choice(line.of(role) or line.members), chance.uniform(*_STOPPED_S)
    member.signal(signal.SIGSTOP)
    time.sleep(seconds)
    member.signal(signal.SIGCONT)
    return f"{member.name} {seconds:.1f} s"


KINDS: dict[str, Fault] = {
    "kill -9 producer": kill_producer,
    "kill -9 replica": kill_replica,
    "kill -9 compactor": kill_compactor,
    "kill -9 server": kill_server,
    "SIGSTOP replica": stop_replica,
    "SIGSTOP producer": stop_producer,
    "disk full": fill_disk,
    "connections cut": cut_connections,
    "connections held": hold_connections,
    "malformed entries": malformed_entries,
}


def drawn(count: int, chance: random.Random) -> list[str]:
    """Draw kinds so that each comes as often as the others, in random order."""
    names = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    chance.shuffle(names)
    return names


def is_small(folder: Path) -> bool:
    """Whether a file system is so small that it may be filled."""
    import shutil

    return shutil.disk_usage(folder).total < 2**29
