"""The convolution whose frames choose their weights: the kernel, run by Triton's interpreter, against plain ones."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from models import slotted_conv, slotted_kernel
from models.slotted_conv import Geometry, gathered_conv2d, slotted_conv2d

ROOT = Path(__file__).resolve().parents[1]

# (kernel, stride, padding, dilation, groups, channels in and out, side)
CASES = [
    (1, 1, 0, 1, 1, 24, 40, 9),
    (1, 2, 0, 1, 1, 16, 8, 7),
    (3, 1, 1, 1, 1, 20, 33, 9),
    (3, 2, 1, 1, 1, 32, 16, 10),
    (3, 1, 2, 2, 1, 17, 5, 8),
    (7, 2, 3, 1, 1, 3, 8, 13),
    (3, 1, 1, 1, 4, 32, 64, 6),
]
SLOTS = [2, 0, 2, 1]


def tensors(case, dtype, with_bias=True):
    kernel, _, _, _, groups, channels, out_channels, side = case
    generator = torch.Generator().manual_seed(kernel * 100 + side)
    x = torch.randn(len(SLOTS), channels, side, side + 2, generator=generator)
    weights = torch.randn(3, out_channels, channels // groups, kernel, kernel, generator=generator)
    bias = torch.randn(3, out_channels, generator=generator) if with_bias else None
    # Slots lie further apart than their weights are long, as they do in a bank.
    spaced = torch.zeros(3, 2, out_channels, kernel, kernel, channels // groups, dtype=dtype)
    spaced[:, 0] = weights.permute(0, 1, 3, 4, 2)
    laid_out = spaced[:, 0].permute(0, 1, 4, 2, 3)
    x = x.to(dtype).to(memory_format=torch.channels_last)
    return x, laid_out, None if bias is None else bias.to(dtype)


def geometry(case):
    _, stride, padding, dilation, groups, *_ = case
    return Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def expected(x, weights, bias, case):
    """Each frame alone, in float32."""
    steps = geometry(case)
    parts = [
        F.conv2d(frame[None].float(), weights[slot].float(), None if bias is None else bias[slot].float(), *steps)
        for frame, slot in zip(x, SLOTS, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_gathered_weights_give_each_frame_its_own_convolution(case, with_bias):
    x, weights, bias = tensors(case, torch.float32, with_bias)
    out = slotted_conv2d(x, weights, bias, torch.tensor(SLOTS), geometry(case))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected(x, weights, bias, case), rtol=1e-4, atol=1e-4)


def test_a_slot_without_numbers_touches_no_other_frame():
    case = CASES[2]
    x, weights, bias = tensors(case, torch.float32)
    before = gathered_conv2d(x, weights, bias, torch.tensor(SLOTS), geometry(case))
    weights[0].fill_(torch.nan)
    after = gathered_conv2d(x, weights, bias, torch.tensor(SLOTS), geometry(case))
    assert after[1].isnan().any()
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


def check_the_kernel() -> None:
    """What the test below runs in a process whose Triton interprets."""
    from models.slotted_conv import indirect_conv2d

    for case in CASES:
        for dtype, slot_dtype in ((torch.float32, torch.int64), (torch.float16, torch.int32)):
            x, weights, bias = tensors(case, dtype, with_bias=case[0] != 1)
            out = indirect_conv2d(x, weights, bias, torch.tensor(SLOTS, dtype=slot_dtype), geometry(case).numbers)
            assert out.dtype == dtype, case
            assert out.is_contiguous(memory_format=torch.channels_last), case
            close = 1e-4 if dtype == torch.float32 else 2e-3
            wanted = expected(x, weights, bias, case)
            torch.testing.assert_close(out.float(), wanted, rtol=close, atol=close * float(wanted.abs().max()))
    slotted_kernel.trial(torch.device("cpu"))
    x, weights, bias = tensors(CASES[2], torch.float32)
    weights[0].fill_(torch.nan)
    x[3].fill_(torch.inf)
    out = indirect_conv2d(x, weights, bias, torch.tensor(SLOTS), geometry(CASES[2]).numbers)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()
    assert not out[3].isfinite().all()


def test_the_kernel_gives_each_frame_its_own_convolution():
    pytest.importorskip("triton")
    command = "import sys; sys.path[:0] = ['tests']; import test_slotted_conv; test_slotted_conv.check_the_kernel()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_where_triton_cannot_compile_weights_are_gathered_and_it_is_said_once(monkeypatch, caplog):
    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(slotted_conv, "_kernel_works", True)
    monkeypatch.setattr(slotted_kernel, "trial", no_compiler)
    slotted_conv.try_kernel(torch.device("cpu"))
    assert len(caplog.messages) == 1
    assert "Failed to find C compiler" in caplog.messages[0]
    asked = []
    monkeypatch.setattr(slotted_conv, "indirect_conv2d", lambda *_: asked.append("kernel"))
    monkeypatch.setattr(slotted_conv, "gathered_conv2d", lambda *_: asked.append("gathered"))
    x, weights, bias = tensors(CASES[2], torch.float32)
    there = SimpleNamespace(is_cuda=True, shape=x.shape)
    slotted_conv2d(there, weights, bias, torch.tensor(SLOTS), geometry(CASES[2]))
    monkeypatch.setattr(slotted_kernel, "trial", lambda device: None)
    slotted_conv.try_kernel(torch.device("cpu"))
    slotted_conv2d(there, weights, bias, torch.tensor(SLOTS), geometry(CASES[2]))
    assert asked == ["gathered", "kernel"]


def test_the_operator_tells_the_compiler_the_shape_of_its_result():
    case = CASES[3]
    x, weights, bias = tensors(case, torch.float32)
    meta = [each.to("meta") for each in (x, weights, bias, torch.tensor(SLOTS))]
    out = torch.ops.proctor.indirect_conv2d(*meta, geometry(case).numbers)
    wanted = gathered_conv2d(x, weights, bias, torch.tensor(SLOTS), geometry(case))
    assert (out.shape, out.stride()) == (wanted.shape, wanted.stride())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the compiled kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tiles", [contextlib.nullcontext, slotted_kernel.tuning], ids=["first", "tuned"])
def test_the_compiled_kernel_gives_each_frame_its_own_convolution(case, dtype, tiles):
    x, weights, bias = tensors(case, dtype)
    weights_there = weights.permute(0, 1, 3, 4, 2).contiguous().cuda().permute(0, 1, 4, 2, 3)
    moved = (x.cuda(), weights_there, bias.cuda(), torch.tensor(SLOTS).cuda())
    close = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}[dtype]
    wanted = expected(x, weights, bias, case)
    with tiles():
        out = slotted_conv2d(*moved, geometry(case)).float().cpu()
    torch.testing.assert_close(out, wanted, rtol=close, atol=close * float(wanted.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the compiled kernel")
@pytest.mark.parametrize("tile", slotted_kernel.TILES, ids=str)
@pytest.mark.parametrize("case", [(3, 1, 1, 1, 1, 64, 128, 64), (3, 1, 1, 1, 1, 72, 100, 37), CASES[5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_tile_gives_each_frame_its_own_convolution(tile, case, dtype, monkeypatch):
    monkeypatch.setattr(slotted_kernel, "_FIRST", slotted_kernel.blocks(*tile) | slotted_kernel._LAUNCH)
    x, weights, bias = tensors(case, dtype)
    weights_there = weights.permute(0, 1, 3, 4, 2).contiguous().cuda().permute(0, 1, 4, 2, 3)
    out = slotted_conv2d(x.cuda(), weights_there, bias.cuda(), torch.tensor(SLOTS).cuda(), geometry(case))
    wanted = expected(x, weights, bias, case)
    close = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(out.float().cpu(), wanted, rtol=close, atol=close * float(wanted.abs().max()))


def test_the_kernel_compiles_for_the_tensor_cores_of_a_device_that_is_not_here(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    kernel = slotted_kernel.kernel()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    fixed = {f"{name}_{axis}": 1 for name in ("stride", "pad", "dilation") for axis in "hw"}
    fixed |= {"kernel_h": 3, "kernel_w": 3, "has_bias": True, "unrolled": False, "precision": "tf32"}
    fixed |= {"block_m": 64, "block_n": 64, "block_k": 32}
    pointers = dict.fromkeys(("x", "weights", "bias", "out"), "*fp16") | {"slots": "*i64"}
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in (*pointers, "channels", "out_channels", "weight_stride", "bias_stride")
        },
    )
    made = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
