"""A camera: a source whose pictures are stamped and paced into frames."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from producers.frame import Frame, check_camera, check_product
from producers.sequence import Sequence
from producers.sources import Source


@dataclass(frozen=True)
class Camera:
    """Names of a camera and its source.

    Attributes:
        product: what it looks at.
        name: the camera's name.
        source: its pictures.
        fps: frames a second, None for as fast as the source gives.
        loop: start the source over at its end, for ever.
    """

    product: str
    name: str
    source: Source
    fps: float | None = None
    loop: bool = False

    def __post_init__(self) -> None:
        check_product(self.product)
        check_camera(self.name)

    def frames(self, sequence: Sequence, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames, stamped at capture, until the source ends or `stop` is set.

        A consumer that falls behind slows the camera down: lost time is not made up by a burst.
        """
        due = time.monotonic()
        while not stop.is_set():
            empty = True
            for picture in self.source:
                empty = False
                if stop.wait(max(0.0, due - time.monotonic())) or stop.is_set():
                    return
                yield Frame(self.product, self.name, sequence.next(), time.time_ns(), picture)
                if self.fps:
                    due = max(due + 1.0 / self.fps, time.monotonic())
            if not self.loop or empty:
                return
