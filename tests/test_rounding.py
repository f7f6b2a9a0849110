"""Layers that keep float32 in a network of bfloat16."""

import torch
from torch import nn

from models.inference import prepare
from models.rounding import Unrounded
from models.teachers import load_teacher

CPU = torch.device("cpu")


def test_bfloat16_goes_past_it_and_other_types_do_not():
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ):
        network = nn.Sequential(Unrounded(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 1))
        before = network[0][0].weight.clone()
        network.to(dtype=dtype, memory_format=torch.channels_last)
        assert (network[0][0].weight.dtype, network[1].weight.dtype) == (kept, dtype)
        assert network[0][0].weight.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.bfloat16:
            assert torch.equal(network[0][0].weight, before)
        assert network(torch.randn(1, 3, 5, 5, dtype=dtype)).dtype == dtype


def test_in_bfloat16_the_small_teacher_is_within_a_few_per_cent_of_itself():
    teacher = load_teacher("efficientnet_lite0")
    # A grey surface with little contrast, as of machined steel.
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.03 * torch.randn(2, 3, 96, 96, generator=generator)
    with torch.inference_mode():
        exact = prepare(teacher, CPU, torch.float32)(images)
        rounded = prepare(teacher, CPU, torch.bfloat16)(images.bfloat16())
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.bfloat16
        assert float((one - other.float()).norm() / one.norm()) < 0.04
