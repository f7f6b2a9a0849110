"""The Triton kernel of the slotted convolution: an implicit matrix product whose weights each frame picks itself.

Loaded only where Triton runs: on CUDA, or in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

if find_spec("triton") is not None:  # torch for CPUs alone comes without
    import triton
    import triton.language as tl


def blocks(rows: int, columns: int, depth: int) -> dict[str, int]:
    """Return a tile of positions by output channels, and what is added to sums at a time, as the kernel takes it."""
    return {"block_m": rows, "block_n": columns, "block_k": depth}


# Fewer input channels than this are unrolled together with the kernel's taps; more fill a tile by themselves.
_NARROW = 16
# What the interpreter runs, where there is nothing to tune.
_FIXED = blocks(32, 16, 16)
# Rows, columns and depth to choose from. All have 4 warps: with 8, Triton has computed convolutions wrongly whose loop
# runs over taps and channels alike (inductor's own template is kept to 4 for that).
TILES = ((32, 32, 32), (64, 64, 32), (128, 64, 32), (64, 64, 64), (128, 128, 32))
_LAUNCH = {"num_warps": 4, "num_stages": 3}
# What serves until the tiles are tuned: fair for every layer, and compiled once for each kind of kernel.
_FIRST = blocks(64, 64, 32) | _LAUNCH

_thread = threading.local()


def _convolve(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x,
    weights,
    bias,
    slots,
    out,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_channels,
    groups,
    weight_stride,
    bias_stride,
    kernel_h: tl.constexpr,
    kernel_w: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pad_h: tl.constexpr,
    pad_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    has_bias: tl.constexpr,
    unrolled: tl.constexpr,
    precision: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """Compute a tile of block_m positions and block_n output channels of one group of one frame.

    x (B, H, W, groups * channels), out (B, OH, OW, groups * out_channels), each slot's weights
    (groups * out_channels, kernel_h, kernel_w, channels): innermost axis last in memory.
    """
    frame = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + frame).to(tl.int64)
    tiles = tl.cdiv(out_channels, block_n)
    group = tl.program_id(1) // tiles

    position = tl.program_id(0) * block_m + tl.arange(0, block_m)
    output = (tl.program_id(1) % tiles) * block_n + tl.arange(0, block_n)
    top = (position // out_width) * stride_h - pad_h
    left = (position % out_width) * stride_w - pad_w
    inside = position < out_height * out_width
    x_frame = x + frame * height * width * groups * channels + group * channels
    taps: tl.constexpr = kernel_h * kernel_w
    depth = taps * channels
    w_row = weights + slot * weight_stride + (group * out_channels + output).to(tl.int64) * depth

    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    blocks = tl.cdiv(channels, block_k)
    steps = tl.cdiv(depth, block_k) if unrolled else taps * blocks
    for step in range(0, steps):
        if unrolled:
            k = step * block_k + tl.arange(0, block_k)
            tap, channel, valid = k // channels, k % channels, k < depth
            row = top[:, None] + (tap // kernel_w * dilation_h)[None, :]
            column = left[:, None] + (tap % kernel_w * dilation_w)[None, :]
        else:
            tap = step // blocks
            channel = (step % blocks) * block_k + tl.arange(0, block_k)
            valid = channel < channels
            k = tap * channels + channel
            row = top[:, None] + tap // kernel_w * dilation_h
            column = left[:, None] + tap % kernel_w * dilation_w
        seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        x_at = (row * width + column) * (groups * channels) + channel[None, :]
        x_tile = tl.load(x_frame + x_at, mask=seen & inside[:, None] & valid[None, :], other=0.0)
        w_tile = tl.load(w_row[None, :] + k[:, None], mask=valid[:, None] & (output < out_channels)[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=precision)

    wanted = output < out_channels
    if has_bias:
        shift = tl.load(bias + slot * bias_stride + group * out_channels + output, mask=wanted, other=0.0)
        total += shift.to(tl.float32)[None, :]
    out_at = (frame * out_height * out_width + position)[:, None] * (groups * out_channels)
    out_at += group * out_channels + output[None, :]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@cache
def kernel() -> Any:
    """Return the kernel for Triton to compile or to interpret."""
    return triton.jit(_convolve)


def _one(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


def trial(device: torch.device) -> None:
    """Have Triton compile and run a kernel that stores one number.

    Raises:
        Exception: It cannot; most often there is no C compiler, or Python's headers are not installed.
    """
    out = torch.zeros(1, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        triton.jit(_one)[(1,)](out)
    if out.item() != 1.0:
        raise RuntimeError("a kernel ran and did nothing")


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Let this thread's launches take the fastest tiles; of a layer's shape that is new they are timed first."""
    _thread.tunes = True
    try:
        yield
    finally:
        _thread.tunes = False


def is_tuning() -> bool:
    """Whether this thread is within `tuning`."""
    return getattr(_thread, "tunes", False)


@cache
def _tuned() -> Any:
    """Return the kernel with tiles to choose from: few, since each is compiled and timed once for each layer's shape.

    The batch is no part of the choice for the same reason.
    """
    configs = [triton.Config(blocks(*each), **_LAUNCH) for each in TILES]
    key = ["out_height", "channels", "out_channels", "kernel_h", "stride_h"]
    return triton.autotune(configs=configs, key=key, cache_results=True)(kernel())


def launch(
    x: Tensor, weights: Tensor, bias: Tensor | None, slots: Tensor, out: Tensor, geometry: tuple[int, ...]
) -> None:
    """Convolve into `out`.

    Args:
        x: (B, C, H, W) channels_last.
        weights: (N, O, C / groups, kh, kw), each slot's own part channels_last and dense.
        bias: (N, O), each slot's own part dense, or None.
        slots: (B,) int32 or int64.
        out: (B, O, OH, OW) channels_last.
        geometry: Stride, padding and dilation, each as (vertical, horizontal), and the groups: seven numbers.
    """
    *steps, groups = geometry
    channels, out_channels = weights.shape[2], weights.shape[1] // groups
    positions = out.shape[2] * out.shape[3]

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        tiles = groups * triton.cdiv(out_channels, tile["block_n"])
        return (triton.cdiv(positions, tile["block_m"]), tiles, len(x))

    launched, tiles = (_tuned(), {}) if is_tuning() else (kernel(), _FIRST)
    if _interpreted():
        launched, tiles = kernel(), _FIXED
    launched[grid](
        x,
        weights,
        x if bias is None else bias,
        slots,
        out,
        *x.shape[2:],
        *out.shape[2:],
        channels,
        out_channels,
        groups,
        weights.stride(0),
        0 if bias is None else bias.stride(0),
        *weights.shape[3:],
        *steps,
        has_bias=bias is not None,
        unrolled=channels < _NARROW,
        precision="ieee" if x.dtype == torch.float32 else "tf32",
        **tiles,
    )
