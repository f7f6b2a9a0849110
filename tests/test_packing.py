"""Fused and packed convolutions compute what the plain network computes, for every detector and teacher."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from models.detectors import DETECTORS, make_detector
from models.folding import fold_batchnorm, same_outputs
from models.fusing import FusedBlock, fuse
from models.inference import infer, to_input
from models.packing import FusedConvolution, pack
from models.programs import Program, state_of
from models.teachers import load_teacher

SIDE = 64


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("efficientnet_lite0")


def folded(network):
    return fold_batchnorm(network, network.probe()).requires_grad_(False)


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, FusedConvolution)]


def values(network, probe):
    """All tensors that a network returns."""
    with torch.inference_mode():
        return tree_leaves(network(*probe))


def error(found, exact):
    """Largest difference, relative to each tensor's largest value."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_packed_student_computes_what_the_plain_one_does(teacher, name):
    """It is as near to the result in float64 as the plain one: how near that is, normalisations in between decide."""
    torch.manual_seed(0)
    student = make_detector(name).build_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain = folded(student)
    found, probe = values(plain, plain.probe()), plain.probe()
    packed = fuse(plain, probe)
    pack(packed, probe)
    assert convolutions(packed)
    assert all(each.packed for each in convolutions(packed))
    exact = values(copy.deepcopy(plain).double(), tree_map(torch.Tensor.double, probe))
    assert error(values(packed, probe), exact) <= 3 * error(found, exact) + 1e-6
    assert error(found, exact) < 1e-3


def test_activations_behind_convolutions_are_no_pass_of_their_own(teacher):
    student = folded(make_detector("stfpm").build_student(teacher))
    fused = fuse(student, student.probe())
    assert not [module for module in fused.modules() if isinstance(module, nn.ReLU | nn.Conv2d)]
    assert sum(isinstance(module, FusedBlock) for module in fused.modules()) == 6
    assert [module for module in student.modules() if isinstance(module, nn.ReLU)], "the network itself is left alone"
    quick = fuse(folded(teacher), teacher.probe())
    assert sum(each.activation == "hardtanh" for each in convolutions(quick)) >= 15


def test_a_result_that_is_used_twice_keeps_the_network_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()

        def forward(self, x):
            y = self.convolution(x)
            return self.relu(y) - y

    network = Twice().eval()
    assert fuse(network, (torch.randn(1, 3, 8, 8),)) is network


def test_weights_laid_out_for_one_shape_serve_others(teacher):
    plain = folded(teacher)
    packed = fuse(plain, plain.probe())
    pack(packed, plain.probe())
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    assert same_outputs(plain, packed, (images,))


@pytest.fixture(scope="module")
def compiled(teacher):
    """A compiled program of small students two of them, and inputs."""
    detector = make_detector("stfpm", {"width": 0.125})
    students = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        student = folded(detector.build_student(teacher))
        student = fuse(student, student.probe()).to(memory_format=torch.channels_last)
        students.append(student)
    images = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    with torch.no_grad():
        inputs = to_input(images, teacher, torch.float32)
        given = (inputs, *teacher(inputs))
        for student in students:
            pack(student, (inputs, given[1:]))
    program = Program(students[0], lambda net, images, *features: infer(detector, net, images, features))
    expected = [program(student, state_of(student), given) for student in students]
    with pytest.MonkeyPatch.context() as patch:
        times = iter([2.0, 1.0])  # the compiled form counts as faster, however busy this machine is
        patch.setattr("models.programs._seconds", lambda call: next(times))
        program.compile(state_of(students[0]), given)
    assert program.is_compiled(given)
    return program, students, given, expected


def test_one_compiled_program_serves_every_network_of_its_build(compiled):
    program, students, given, expected = compiled
    for student, (maps, scores) in zip(students, expected, strict=True):
        for found_maps, found_scores in (program(student, state_of(student), given),):
            torch.testing.assert_close(found_maps, maps, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found_scores, scores, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0][0], expected[1][0], rtol=0.05)


def test_shapes_that_were_not_compiled_are_computed_all_the_same(compiled):
    program, students, given, expected = compiled
    one = tuple(each[:1] for each in given)
    assert not program.is_compiled(one)
    maps, _ = program(students[1], state_of(students[1]), one)
    torch.testing.assert_close(maps, expected[1][0][:1], rtol=1e-4, atol=1e-5)


def test_a_compiled_form_that_is_slower_is_not_kept(compiled, monkeypatch):
    program, students, given, _ = compiled
    slow = Program(students[0], program._network.compute)
    times = iter([1.0, 2.0])
    monkeypatch.setattr("models.programs._seconds", lambda call: next(times))
    slow.compile(state_of(students[0]), given)
    assert not slow.is_compiled(given)


def test_packing_touches_no_other_copy(teacher):
    plain = folded(teacher)
    fused = fuse(plain, plain.probe())
    other = copy.deepcopy(fused)
    pack(fused, plain.probe())
    assert not any(each.packed for each in convolutions(other))
