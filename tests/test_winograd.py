"""Winograd's convolutions compute what plain ones compute, before they are compiled and as the compiler sees them."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from models import winograd
from models.geometry import Geometry
from models.packing import FusedConvolution, pack
from models.programs import Program, state_of

PLAIN = Geometry(padding=(1, 1)).numbers


def drawn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)


def rectified(y, added):
    return F.relu(y if added is None else y + added)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "biased", "joined"), [(8, 8, True, True), (6, 10, False, False), (7, 9, True, True)]
)
def test_it_computes_what_a_plain_convolution_does(traced, height, width, biased, joined):
    x, weight = drawn(2, 5, height, width), drawn(3, 5, 3, 3, seed=1)
    bias = drawn(3, seed=2) if biased else None
    added = drawn(2, 3, height, width, seed=3) if joined else None

    def convolved(x, weight):
        return winograd.convolve(x, winograd.transform(weight), bias, rectified, added)

    call = make_fx(convolved)(x, weight) if traced else convolved
    if traced:
        assert "as_strided" not in call.code, "the compiler is given small steps that it joins"
    found, expected = call(x, weight), rectified(F.conv2d(x, weight, bias, padding=1), added)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == expected.shape


@pytest.mark.parametrize("traced", [False, True])
def test_half_precision_costs_about_twice_what_it_costs_a_plain_convolution(traced):
    x, weight = drawn(1, 64, 32, 32).relu(), drawn(64, 64, 3, 3, seed=1) / 24
    exact = F.conv2d(x, weight, padding=1)
    halves = x.bfloat16(), weight.bfloat16()

    def convolved(x, weight):
        return winograd.convolve(x, winograd.transform(weight), None, lambda y, added: y)

    def error(found):
        return float((found.float() - exact).norm() / exact.norm())

    plain = error(F.conv2d(*halves, padding=1))
    quick = error((make_fx(convolved)(*halves) if traced else convolved)(*halves))
    assert plain < quick < 2.5 * plain


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (True, {}),
        (True, {"channels": 256, "side": 16}),
        (False, {"channels": 32, "side": 128}),
        (False, {"side": 16}),
        (False, {"side": 65}),
        (False, {"dtype": torch.float32}),
        (False, {"kernel": 1}),
        (False, {"geometry": Geometry(stride=(2, 2), padding=(1, 1)).numbers}),
        (False, {"geometry": Geometry(padding=(1, 1), groups=2).numbers}),
    ],
)
def test_it_is_taken_where_a_layer_is_large_and_computed_in_bfloat16(monkeypatch, expected, changes):
    case = {"channels": 64, "side": 64, "dtype": torch.bfloat16, "kernel": 3, "geometry": PLAIN} | changes
    channels, side = case["channels"], case["side"]
    weight = torch.empty(channels, channels, case["kernel"], case["kernel"], dtype=case["dtype"])
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert winograd.pays(weight, case["geometry"], (1, channels, side, side)) is expected


def test_a_processor_with_matrix_units_does_without(monkeypatch):
    weight, shape = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16), (1, 64, 64, 64)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert not winograd.pays(weight, PLAIN, shape)


def test_what_will_not_be_compiled_keeps_plain_convolutions(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    network = Residual(64, 1).to(torch.bfloat16)
    pack(network, (drawn(1, 64, 32, 32, dtype=torch.bfloat16),))
    assert network.first.packed
    assert not network.first.transformed


class Residual(nn.Module):
    """A residual block of two convolutions, each with what follows it."""

    def __init__(self, channels, seed):
        super().__init__()
        torch.manual_seed(seed)
        plain = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.first, self.second = FusedConvolution(plain[0], "relu"), FusedConvolution(plain[1])

    def forward(self, x):
        return self.second(self.first(x), x)


def test_one_compiled_program_serves_packed_networks_of_any_weights(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    x = drawn(2, 64, 32, 32).relu().bfloat16()
    networks, expected = [], []
    for seed in (1, 2):
        network = Residual(64, seed).requires_grad_(False)
        expected.append(network(x.float()))
        network = network.to(torch.bfloat16)
        with torch.inference_mode():
            pack(network, (x,), compiled=True)
        networks.append(network)
        assert network.first.transformed
        assert network.first.weight.shape == (16, 64, 64)
    program = Program(networks[0], lambda network, x: (network(x),))
    eager = [program(network, state_of(network), (x,))[0] for network in networks]
    times = iter([2.0, 1.0])  # the compiled form counts as faster, however busy this machine is
    monkeypatch.setattr("models.programs._seconds", lambda call: next(times))
    with torch.inference_mode():
        program.compile(state_of(networks[0]), (x,))
    assert program.is_compiled((x,))
    for network, before, exact in zip(networks, eager, expected, strict=True):
        (found,) = program(network, state_of(network), (x,))
        for each in (found, before):
            torch.testing.assert_close(each.float(), exact, rtol=0.03, atol=0.03)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1, atol=0.1)
