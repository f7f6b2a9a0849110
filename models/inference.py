"""From images to anomaly maps and scores; the same steps serve calibration, evaluation and the engine."""

from __future__ import annotations

import contextlib
import functools
import math
import timeit
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector, Student
from models.errors import ModelError
from models.folding import fold_batchnorm, pool_first
from models.settings import checked_device
from models.teachers import Features, Teacher

Network = TypeVar("Network", Teacher, Student)

_LEAST_GAIN = 1.2  # of bfloat16, for which rounding is worth it


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name` ('cpu', 'cuda', 'cuda:1'); 'auto' takes a GPU where there is one.

    Raises:
        ModelError: No such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(checked_device(name))
    except ValueError as error:
        raise ModelError(str(error)) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def best_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest dtype: float16 on CUDA, bfloat16 on CPUs that gain by it, else float32."""
    if device.type == "cuda":
        return torch.float16
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    if torch.cpu._is_avx512_bf16_supported() and _bfloat16_gain() >= _LEAST_GAIN:
        return torch.bfloat16
    return torch.float32


@functools.cache
def _bfloat16_gain() -> float:
    """How many times as fast as in float32 this CPU convolves in bfloat16; takes some 30 ms, once a process.

    An AMD EPYC with AVX512-BF16 is nearly twice as fast. An Intel Xeon whose matrix units are hidden from a virtual
    machine multiplies as many numbers a cycle in either type, and pays for the conversion.
    """

    def convolution(dtype: torch.dtype) -> Callable[[], Tensor]:
        x, weight = (
            torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((1, 64, 56, 56), (64, 64, 3, 3))
        )
        return lambda: F.conv2d(x, weight, padding=1)

    runs = {dtype: convolution(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(runs, math.inf)
    # In one thread, as each of the engine's streams computes: how two share a small layer is a matter of luck.
    with torch.inference_mode(), torch_threads(1):
        for run in runs.values():
            run()  # the kernel is chosen at its first use
        for _ in range(10):  # in turn, so that other work on the machine slows both alike
            for dtype, run in runs.items():
                seconds[dtype] = min(seconds[dtype], timeit.timeit(run, number=1))
    return seconds[torch.float32] / seconds[torch.bfloat16]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch's operations on the CPU use so many threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(module: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """Return a copy of a float32 network that is ready to infer; the network itself is left as it is.

    The copy is in evaluation mode without gradients, has batch normalisation folded into its convolutions and the
    stem's bias and ReLU behind its pooling, and lies on `device` in `dtype` and channels_last. A copy that was prepared
    before cannot be prepared again.
    """
    folded = fold_batchnorm(module, module.probe())
    ready = pool_first(folded, module.probe()).requires_grad_(False)
    if isinstance(ready, Student):
        ready.round_up()
    return ready.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_input(images: Tensor, teacher: Teacher, dtype: torch.dtype) -> Tensor:
    """Normalise images for a teacher and its students.

    Args:
        images: (B, S, S, 3) uint8, RGB, 0..255, on the teacher's device.
        teacher: Says mean and standard deviation.
        dtype: Of the result.

    Returns:
        (B, 3, S, S) `dtype` in channels_last memory format.
    """
    # Channels stay innermost, so the permuted view already is channels_last.
    return ((images.float() - teacher.colours.mean) / teacher.colours.std).to(dtype).permute(0, 3, 1, 2)


@torch.inference_mode()
def infer(detector: Detector, student: Student, images: Tensor, teacher_features: Features) -> tuple[Tensor, Tensor]:
    """Judge a batch of one product.

    Args:
        detector: The method the student was trained by.
        student: Prepared student.
        images: (B, 3, S, S) as `to_input` returns them.
        teacher_features: The teacher's features of the same images.

    Returns:
        (B, S, S) float32 anomaly maps and (B,) float32 scores.
    """
    maps = detector.scale_maps(student(images, teacher_features))
    fused = detector.fuse(maps, images.shape[-1], student.statistics)
    return fused, detector.score(fused)
