"""`proctor push`: a camera's frames into its stream, with progress."""

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from producers import keys
from producers.camera import Camera
from producers.errors import ServerUnavailable
from producers.publisher import Published, Publisher
from producers.redis_errors import REDIS_ERRORS, trouble
from producers.sequence import Sequence
from producers.settings import PublisherSettings


@dataclass(frozen=True)
class PushSummary:
    """What was pushed.

    Attributes:
        product: the product.
        camera: the camera.
        captured: frames taken from the source.
        published: frames in the stream.
        shed: frames given up when the push was ended while the stream was full.
        seconds: duration.
    """

    product: str
    camera: str
    captured: int
    published: int
    shed: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """For people."""
        rate = self.published / self.seconds if self.seconds else 0.0
        shed = f", {self.shed} in hand not sent (shed)" if self.shed else ""
        return f"pushed {self.published} frames as {self.product}/{self.camera}, {rate:.1f} frames/s{shed}"


def push_frames(
    camera: Camera, server: redis.Redis, settings: PublisherSettings, stop: threading.Event, console: Console
) -> PushSummary:
    """Publish a camera's frames until its source ends or `stop` is set.

    Raises:
        ProducerError: Redis stays away, or another producer uses the camera's name.
    """
    publisher = Publisher(server, settings)
    try:
        if not server.exists(keys.model(camera.product)):
            console.print(
                f"[yellow]{camera.product} has no version in service: its frames get the verdict `unknown`[/]"
            )
    except REDIS_ERRORS as error:
        raise ServerUnavailable(trouble(error)) from None
    sequence = Sequence(after=publisher.last_seq(camera.product, camera.name))
    captured = published = 0
    started = time.monotonic()
    total = len(camera.source) if not camera.loop and len(camera.source) else None
    columns = (
        TextColumn(f"{camera.product}/{camera.name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("push", total=total, rate="")
        for frame in camera.frames(sequence, stop):
            captured += 1
            published += publisher.publish(frame, stop) is Published.ADDED
            rate = f"{published / max(1e-9, time.monotonic() - started):.1f} frames/s"
            progress.update(task, completed=published, rate=rate)
    return PushSummary(
        camera.product, camera.name, captured, published, captured - published, time.monotonic() - started
    )
