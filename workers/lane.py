"""The way of frames of one teacher and one input size through the device: its static buffers and its teacher."""

import queue
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.inference import to_input
from models.teachers import Features, Teacher
from workers.graphs import Captures, Compute, Graphs, capacities_up_to

# One is filled by the CPU and one comes back while a third batch is computed.
_STAGES = 3


@dataclass(eq=False)
class Stage:
    """What one batch needs of its own while others are under way, for up to B frames of S x S pixels.

    Attributes:
        frames: (B, S, S, 3) uint8 RGB, pinned.
        index: (6 B,) int64, pinned; row numbers and slots on their way to the device.
        arrived: (B, S, S, 3) uint8 on the device.
        maps: (B, S, S) float32 on the device.
        scores: (B,) float32 on the device.
    """

    frames: Tensor
    index: Tensor
    arrived: Tensor
    maps: Tensor
    scores: Tensor


@dataclass(eq=False)
class Buffers:
    """Where graphs read and write, for up to B frames of S x S pixels; all on the device.

    Attributes:
        frames: (B, S, S, 3) uint8 RGB.
        images: (B, 3, S, S) normalised, channels_last.
        features: the teacher's, (B, C, S/s, S/s) each, channels_last.
        maps: (B + 1, S, S) float32; the last takes what padding rows give.
        scores: (B + 1,) float32, likewise.
    """

    frames: Tensor
    images: Tensor
    features: Features
    maps: Tensor
    scores: Tensor


@dataclass(eq=False)
class Lane:
    """Frames of one teacher and input size.

    Args:
        teacher: prepared for the device.
        size: side of the input in pixels.
        most: largest batch.
        dtype: that the teacher computes in.
        graphs: of the device.
    """

    teacher: Teacher
    size: int
    most: int
    dtype: torch.dtype
    graphs: Graphs
    stages: "queue.SimpleQueue[Stage]" = field(init=False)
    buffers: Buffers = field(init=False)
    looks: Captures = field(init=False)

    def __post_init__(self) -> None:
        device = next(self.teacher.parameters()).device
        self.buffers = self._allocate(device)
        self.stages = queue.SimpleQueue()
        for _ in range(_STAGES):
            self.stages.put(self._stage(device))
        self.looks = Captures(self.graphs, capacities_up_to(self.most), self, self.look)

    def look(self, frames: Tensor) -> tuple[Tensor, Features]:
        """Normalise (B, S, S, 3) frames and return them as (B, 3, S, S) with the teacher's features."""
        images = to_input(frames, self.teacher, self.dtype)
        return images, self.teacher(images)

    def do(self, compute: Compute, capacity: int) -> None:
        """Look at the first frames of the buffers, see `Job`."""
        images, features = compute(self.buffers.frames[:capacity])
        self.buffers.images[:capacity].copy_(images)
        for buffer, feature in zip(self.buffers.features, features, strict=True):
            buffer[:capacity].copy_(feature)

    def rehearse(self, compute: Compute, capacity: int) -> None:
        """Look and copy, but to nowhere, see `Job`."""
        images, features = compute(self.buffers.frames[:capacity])
        for each in (images, *features):
            torch.empty_like(each).copy_(each)

    def _allocate(self, device: torch.device) -> Buffers:
        frames = torch.zeros(self.most, self.size, self.size, 3, dtype=torch.uint8, device=device)
        images, features = self.look(frames[:1])
        return Buffers(
            frames,
            self._room(images),
            tuple(map(self._room, features)),
            torch.zeros(self.most + 1, self.size, self.size, device=device),
            torch.zeros(self.most + 1, device=device),
        )

    def _room(self, one: Tensor) -> Tensor:
        """Return zeros for as many rows as there may be, each like the one of (1, C, h, w)."""
        channels, height, width = one.shape[1:]
        return one.new_zeros(self.most, height, width, channels).permute(0, 3, 1, 2)

    def _stage(self, device: torch.device) -> Stage:
        host: dict[str, Any] = {"pin_memory": device.type == "cuda"}
        shape = (self.most, self.size, self.size)
        return Stage(
            torch.empty(*shape, 3, dtype=torch.uint8, **host),
            torch.empty(6 * self.most, dtype=torch.long, **host),
            torch.empty(*shape, 3, dtype=torch.uint8, device=device),
            torch.empty(shape, device=device),
            torch.empty(self.most, device=device),
        )
