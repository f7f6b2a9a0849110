"""What a device can do at the most, measured beside the engine, and what a frame asks of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Patience, timed
from models.inference import torch_threads
from models.training import TrainedStudent


@dataclass(frozen=True)
class Roofline:
    """A device's limits in one precision.

    Attributes:
        tflops: of a large matrix product, 2 operations for each multiplication.
        gb_per_s: of a large copy, bytes read plus bytes written.
    """

    tflops: float
    gb_per_s: float


def measure_roofline(device: torch.device, dtype: torch.dtype, threads: int, patience: Patience) -> Roofline:
    """Measure a device's limits; the best call counts, since a limit has no slow half."""
    on_gpu = device.type == "cuda"
    side, mebibytes = (8192, 1024) if on_gpu else (2048, 128)
    with torch_threads(threads), torch.inference_mode():
        left = torch.randn(side, side, device=device).to(dtype)
        right, product = torch.randn_like(left), torch.empty_like(left)
        source = torch.zeros(mebibytes * 2**20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def multiply() -> None:
            torch.mm(left, right, out=product)
            _wait(device)

        def copy() -> None:
            target.copy_(source)
            _wait(device)

        multiplied, copied = min(timed(multiply, patience).seconds), min(timed(copy, patience).seconds)
    return Roofline(tflops=2 * side**3 / multiplied / 1e12, gb_per_s=2 * source.numel() / copied / 1e9)


def gflop_of(student: TrainedStudent) -> float:
    """Count the operations of teacher and student on one frame, 2 for each multiply-add of convolutions and matrix
    products; what is elementwise, the maps and their fusion are left out.
    """
    images = torch.zeros(1, 3, student.settings.input_size, student.settings.input_size)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        student.student(images, student.teacher(images))
    return counter.get_total_flops() / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
