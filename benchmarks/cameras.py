"""Cameras in a process of their own, as real ones do not share the inspector's interpreter.

`python -m benchmarks.cameras` reads one order a line of JSON from standard input and answers it by one line when the
last frame is published. It loads neither PyTorch nor Ray.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from benchmarks.pictures import Input
from producers import keys
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.sequence import Sequence
from producers.settings import PublisherSettings

PLAIN_STREAM = "plain"


@dataclass(frozen=True)
class Order:
    """Frames to publish.

    Attributes:
        product: whose.
        frames: how many, of all cameras together.
        cameras: a thread each.
        fps: frames a second of all together; None for as fast as it goes.
        max_in_flight: beyond that a camera waits.
        plain: frames in a plain pipeline of XADD instead of the publisher; 0 for the publisher.
    """

    product: str
    frames: int
    cameras: int = 2
    fps: float | None = None
    max_in_flight: int = 128
    plain: int = 0


class Cameras:
    """The process, from the side of a measurement.

    Args:
        url: of the server.
        given: what the cameras see.

    Attributes:
        bytes_per_frame: of the pictures.
        cpu_s: processor time of the orders that were answered.
    """

    def __init__(self, url: str, given: Input) -> None:
        home = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "benchmarks.cameras"]
        self._process = subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell({"url": url, "codec": given.codec, "size": given.size})
        self.cpu_s = 0.0
        self.bytes_per_frame: int = self.answer()["bytes_per_frame"]

    def begin(self, order: Order) -> None:
        """Have frames published; `answer` waits for the end."""
        self._tell(asdict(order))

    def answer(self) -> dict[str, Any]:
        """Wait until an order is done; return the `seconds` it took.

        Raises:
            RuntimeError: the process ended; standard error says why.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the cameras' process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        self.cpu_s += answer.get("cpu_s", 0.0)
        return answer

    def check(self) -> None:
        """Raise RuntimeError if the process has ended: who waits for its frames would wait for ever."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the cameras' process ended with status {self._process.returncode}")

    def publish(self, order: Order) -> float:
        """Have frames published and wait for the last; return the seconds."""
        self.begin(order)
        return float(self.answer()["seconds"])

    def _tell(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # they may wait for a reader that is no more
            self._process.kill()
        self._process.communicate(timeout=30)  # the end of its input is the end of its work


def main() -> None:
    """Carry out orders until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the program that measures, which then ends this one
    given = json.loads(sys.stdin.readline())
    pictures = Input(given["codec"], given["size"]).pictures()
    _reply({"bytes_per_frame": sum(len(each.data) for each in pictures) // len(pictures)})
    sequence = Sequence()
    for line in sys.stdin:
        order = Order(**json.loads(line))
        started, used = time.perf_counter(), time.process_time()
        if order.plain:
            _publish_plain(redis.Redis.from_url(given["url"]), order, pictures)
        else:
            _publish(given["url"], order, pictures, sequence)
        _reply({"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - used})


def _publish(url: str, order: Order, pictures: list[Picture], sequence: Sequence) -> None:
    settings = PublisherSettings(max_in_flight=order.max_in_flight, max_in_flight_mb=65536, memory_share=1)
    publishers = [Publisher(redis.Redis.from_url(url), settings) for _ in range(order.cameras)]
    process = os.getpid()  # numbers begin at the second, and the process before may have begun in the same one

    def film(number: int) -> None:
        due = time.perf_counter()
        for index in range(number, order.frames, order.cameras):
            if order.fps:
                time.sleep(max(0.0, due - time.perf_counter()))
                due += order.cameras / order.fps
            picture = pictures[index % len(pictures)]
            publishers[number].publish(
                Frame(order.product, f"cam-{process}-{number}", sequence.next(), time.time_ns(), picture)
            )

    with ThreadPoolExecutor(order.cameras) as threads:
        list(threads.map(film, range(order.cameras)))  # what a camera raises ends the process


def _publish_plain(server: redis.Redis, order: Order, pictures: list[Picture]) -> None:
    """Add the same bytes by pipelines of XADD, without a ledger; wait while the reader is far behind."""
    stream = keys.frames(PLAIN_STREAM)
    for first in range(0, order.frames, order.plain):
        while server.xlen(stream) >= order.max_in_flight:
            time.sleep(0.0005)
        pipeline = server.pipeline(transaction=False)
        for index in range(first, min(first + order.plain, order.frames)):
            frame = Frame(PLAIN_STREAM, "cam-0", index + 1, time.time_ns(), pictures[index % len(pictures)])
            fields: Any = frame.to_fields()
            pipeline.xadd(stream, fields)
        pipeline.execute()


def _reply(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
