"""Streams of a device: what is queued on one is done in order, and one may wait for what another has queued."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A point in a stream's order; None where everything before it is done already.
Mark = torch.cuda.Event | None


class Stream:
    """A CUDA stream; on other devices, work is done when it is queued, so order is kept by itself.

    Args:
        device: of the work.
        priority: -1 goes first. Torch deals few streams out again and again, apart for each priority.
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.cuda = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Queue this thread's work here, on this stream's device."""
        with torch.cuda.stream(self.cuda):
            yield

    def mark(self) -> Mark:
        """Mark what is queued so far."""
        return None if self.cuda is None else self.cuda.record_event()

    def wait(self, mark: Mark) -> None:
        """Let what is queued from now on wait for a mark of another stream; the caller does not wait."""
        if self.cuda is not None and mark is not None:
            self.cuda.wait_event(mark)

    def finish(self) -> None:
        """Wait until everything queued is done."""
        if self.cuda is not None:
            self.cuda.synchronize()

    def borrow(self, tensor: torch.Tensor) -> None:
        """Keep a tensor's memory from being given away before what is queued so far has read it."""
        if self.cuda is not None:
            tensor.record_stream(self.cuda)


def finish(mark: Mark) -> None:
    """Wait until what a mark marks is done."""
    if mark is not None:
        mark.synchronize()


@dataclass(frozen=True)
class Streams:
    """What of a device's work may overlap.

    Attributes:
        frames: copies of frames to the device.
        weights: copies of students to the device.
        compute: networks.
        results: copies from the device.
    """

    frames: Stream
    weights: Stream
    compute: Stream
    results: Stream

    @classmethod
    def of(cls, device: torch.device) -> "Streams":
        """Return new streams of a device."""
        return cls(*(Stream(device) for _ in range(4)))

    def finish(self) -> None:
        """Wait until everything queued on any of them is done."""
        for stream in (self.frames, self.weights, self.compute, self.results):
            stream.finish()
