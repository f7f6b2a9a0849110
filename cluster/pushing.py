"""`proctor push`: a camera's frames into its stream, with progress."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cluster.config import ProctorConfig
from cluster.spools import spooled_publisher
from producers import keys
from producers.camera import Camera
from producers.frame import Frame
from producers.publisher import Published, Publisher
from producers.redis_errors import REDIS_ERRORS
from producers.sequence import Sequence
from producers.spooling import SpoolCounts


@dataclass(frozen=True)
class PushSummary:
    """What was pushed.

    Attributes:
        product: the product.
        camera: the camera.
        captured: frames taken from the source.
        published: frames in the stream, those of an earlier push's spool among them.
        shed: frames given up: at a bound, or in hand when the push was ended.
        seconds: duration.
        replayed: published frames that waited in the spool before.
        lost: frames whose record in the spool was damaged.
        waiting: frames that stay in the spool, with the notes of shed ones.
        gave_way: older frames in the stream, of any camera of the product, that were shed for these by `drop_oldest`.
    """

    product: str
    camera: str
    captured: int
    published: int
    shed: int
    seconds: float
    replayed: int = 0
    lost: int = 0
    waiting: int = 0
    gave_way: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """For people."""
        rate = self.published / self.seconds if self.seconds else 0.0
        parts = [f"pushed {self.published} frames as {self.product}/{self.camera}, {rate:.1f} frames/s"]
        parts += [f"{self.replayed} of them through the spool"] if self.replayed else []
        parts += [f"{self.shed} not sent (shed)"] if self.shed else []
        parts += [f"{self.gave_way} older ones shed for them"] if self.gave_way else []
        parts += [f"{self.lost} lost with a damaged spool"] if self.lost else []
        parts += [f"{self.waiting} wait in the spool: `proctor push --replay` sends them"] if self.waiting else []
        return ", ".join(parts)


class _Way(Protocol):
    """How frames get into the stream: through a spool or without one."""

    def last_seq(self) -> int: ...
    def publish(self, frame: Frame, stop: threading.Event) -> Published: ...
    def counts(self) -> SpoolCounts: ...
    def drain(self, stop: threading.Event) -> bool: ...
    def close(self) -> None: ...


class _WithoutSpool:
    """A plain publisher of one camera, which waits for a lost server, then ends."""

    def __init__(self, camera: Camera, publisher: Publisher) -> None:
        self._camera, self._publisher = camera, publisher
        self._published = self._shed = 0

    def last_seq(self) -> int:
        return self._publisher.last_seq(self._camera.product, self._camera.name)

    def publish(self, frame: Frame, stop: threading.Event) -> Published:
        published = self._publisher.publish(frame, stop)
        self._published += published is Published.ADDED
        self._shed += published is Published.SHED
        return published

    def counts(self) -> SpoolCounts:
        return SpoolCounts(published=self._published, shed=self._shed, gave_way=self._publisher.gave_way)

    def drain(self, stop: threading.Event) -> bool:
        return True

    def close(self) -> None:
        pass


def push_frames(
    camera: Camera, server: redis.Redis, config: ProctorConfig, stop: threading.Event, console: Console
) -> PushSummary:
    """Publish a camera's frames until its source ends or `stop` is set, then what waits in its spool.

    Raises:
        ProducerError: another producer uses the camera's name; the spool cannot be used; without a spool, Redis
            stays away.
    """

    def say(line: str) -> None:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    _say_without_version(camera.product, server, say)
    settings = config.publish_settings(camera.product)
    way: _Way = (
        spooled_publisher(config, camera.product, camera.name, server, say)
        if settings.spool_mb
        else _WithoutSpool(camera, Publisher(server, settings, say))
    )
    captured, started = 0, time.monotonic()
    total = len(camera.source) if not camera.loop and len(camera.source) else None
    columns = (
        TextColumn(f"{camera.product}/{camera.name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("push", total=total, rate="")
            for frame in camera.frames(Sequence(after=way.last_seq()), stop):
                captured += 1
                way.publish(frame, stop)
                counts = way.counts()
                progress.update(task, completed=captured, rate=_rate(counts, time.monotonic() - started))
            progress.update(task, rate="sending what is in the spool")
            way.drain(stop)
    finally:
        way.close()
    return _summary(camera, captured, way.counts(), time.monotonic() - started)


def _say_without_version(product: str, server: redis.Redis, say: Callable[[str], None]) -> None:
    try:
        if not server.exists(keys.model(product)):
            say(f"{product} has no version in service: its frames get the verdict `unknown`")
    except REDIS_ERRORS:
        pass  # away; the publisher says so


def _rate(counts: SpoolCounts, seconds: float) -> str:
    parts = [f"{counts.published / max(1e-9, seconds):.1f} frames/s"]
    parts += [f"{counts.waiting} in the spool"] if counts.waiting else []
    parts += [f"{counts.shed} shed"] if counts.shed else []
    return ", ".join(parts)


def _summary(camera: Camera, captured: int, counts: SpoolCounts, seconds: float) -> PushSummary:
    return PushSummary(
        camera.product,
        camera.name,
        captured,
        counts.published,
        counts.shed,
        seconds,
        counts.replayed,
        counts.lost,
        counts.waiting + counts.notes,
        counts.gave_way,
    )
