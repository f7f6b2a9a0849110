"""Slots: every row of a mixed batch gets what its own student gives alone, whatever the detector."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.detectors import DETECTORS, make_detector
from models.inference import infer, prepare
from models.slot_layout import SlotLayout, bind, tensors_of
from models.slotted import Slotted, signature
from models.teachers import STRIDES, load_teacher

SIZE, PRODUCTS = 64, 4
SLOTS = [2, 0, 2, 3, 1, 0]
SMALL = {"width": 0.125}

CASES = {
    **{name: (name, SMALL) for name in DETECTORS if name != "fcl"},
    **{
        f"fcl-{form}": ("fcl", {"host_options": SMALL, "snc": {"form": form, "place": "both"}})
        for form in ("none", "softmax", "uniform", "relation", "masked")
    },
    "fcl-asymts": ("fcl", {"host": "asymts", "host_options": SMALL}),
    "fcl-reverse": ("fcl", {"host": "reverse", "host_options": SMALL}),
    "reverse-dense": ("reverse", {**SMALL, "bottleneck": "dense", "embedding": 16}),
    "asymts-plain": ("asymts", {**SMALL, "blocks": "plain", "momentum": None}),
    **{
        f"stfpm-{kind}": ("stfpm", {**SMALL, "fusion": {"kind": kind, "smoothing": 2.0, "score": "top"}})
        for kind in ("product", "sum", "normalised", "quantile", "geometric")
    },
    "stfpm-weighted": ("stfpm", {**SMALL, "fusion": {"kind": "weighted", "weights": (1, 0, 3)}}),
}


@pytest.fixture(scope="module")
def teacher():
    return prepare(load_teacher("efficientnet_lite0"), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def batch(teacher):
    """Images and their features."""
    images = torch.randn(len(SLOTS), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return images, teacher(images)


def remember(memory, generator, scenes=5, code=8):
    """Give a memory scenes, as a training does, but random ones."""
    side = SIZE // 8
    length, components = memory.code_mean.shape[0], memory.basis.shape[1]
    random = {
        "mean": torch.randn(memory.mean.shape, generator=generator) * 0.1,
        "basis": torch.randn(memory.basis.shape, generator=generator) * 0.1,
        "code_mean": torch.randn(length, generator=generator),
        "code_scale": torch.rand(length, generator=generator) + 0.5,
        "code_basis": torch.randn(length, code, generator=generator),
        "codes": torch.randn(scenes, code, generator=generator),
        "scenes": torch.randint(-127, 128, (scenes, side, side, components), generator=generator, dtype=torch.int8),
        "step": torch.rand((), generator=generator) * 0.01,
    }
    memory.load_state_dict(random)


def trained(detector, teacher, seed, dtype=torch.float32):
    """A student whose weights and statistics are like no other's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = detector.build_student(teacher)
    for name, tensor in tensors_of(student).items():
        if tensor.is_floating_point() and not name.endswith("mask"):
            tensor.data.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
    student.statistics.quantiles[:, 0] += torch.rand(len(student.statistics.scale), generator=generator) * 0.2
    if hasattr(student, "memory"):
        remember(student.memory, generator)
    return prepare(student, torch.device("cpu"), dtype)


def slots_of(students):
    """The students' bytes, a row each."""
    layout = SlotLayout.of(students[0])
    rows = torch.zeros(len(students), layout.nbytes, dtype=torch.uint8)
    for row, student in zip(rows, students, strict=True):
        layout.pack(student, row)
    return rows


def alone(detector, student, batch, row):
    images, features = batch
    return infer(detector, student, images[row : row + 1], tuple(each[row : row + 1] for each in features))


def assert_rows_equal_each_alone(detector, students, batch, slotted, rtol=1e-5):
    with torch.no_grad():
        maps, scores = slotted(*batch, torch.tensor(SLOTS))
    assert (maps.shape, maps.dtype) == ((len(SLOTS), SIZE, SIZE), torch.float32)
    assert (scores.shape, scores.dtype) == ((len(SLOTS),), torch.float32)
    for row, slot in enumerate(SLOTS):
        (expected,), (score,) = alone(detector, students[slot], batch, row)
        assert float((maps[row] - expected).abs().max()) <= rtol * float(expected.abs().max())
        assert float((scores[row] - score).abs()) <= rtol * float(score.abs())
    return maps


@pytest.mark.parametrize("case", CASES)
def test_every_row_gets_what_its_own_student_gives_alone(case, teacher, batch):
    name, options = CASES[case]
    detector = make_detector(name, options)
    students = [trained(detector, teacher, seed) for seed in range(PRODUCTS)]
    slotted = Slotted(students[0], detector, SIZE, slots_of(students))
    maps = assert_rows_equal_each_alone(detector, students, batch, slotted)
    # The students are far from each other, so a row judged by another's would show.
    (other,), _ = alone(detector, students[1], batch, 0)
    assert float((maps[0] - other).abs().max()) > 0.01 * float(other.abs().max())


@pytest.fixture(params=["stfpm", "efficientad", "associative"])
def bank(request, teacher):
    detector = make_detector(request.param, SMALL)
    students = [trained(detector, teacher, seed) for seed in range(PRODUCTS)]
    rows = slots_of(students)
    return detector, students, rows, Slotted(students[0], detector, SIZE, rows)


def judge(slotted, batch):
    with torch.no_grad():
        return slotted(*batch, torch.tensor(SLOTS))[0]


def test_a_student_written_into_a_slot_changes_that_slots_rows_alone(bank, teacher, batch):
    detector, students, rows, slotted = bank
    before = judge(slotted, batch)
    students[2] = trained(detector, teacher, 77)
    SlotLayout.of(students[2]).pack(students[2], rows[2])
    after = assert_rows_equal_each_alone(detector, students, batch, slotted)
    for row, slot in enumerate(SLOTS):
        assert torch.equal(before[row], after[row]) == (slot != 2)


def test_a_student_without_numbers_touches_no_other_row(bank, batch):
    _, students, rows, slotted = bank
    before = judge(slotted, batch)
    blank = copy.deepcopy(students[2])
    for tensor in tensors_of(blank).values():
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)
    SlotLayout.of(blank).pack(blank, rows[2])
    after = judge(slotted, batch)
    for row, slot in enumerate(SLOTS):
        assert after[row].isnan().any() if slot == 2 else torch.equal(before[row], after[row])


def test_half_precision_keeps_statistics_in_full(teacher, batch):
    detector = make_detector("asymts", SMALL)
    half = prepare(load_teacher("efficientnet_lite0"), torch.device("cpu"), torch.bfloat16)
    students = [trained(detector, teacher, seed, torch.bfloat16) for seed in range(PRODUCTS)]
    kept = {field.name: field.dtype for field in SlotLayout.of(students[0]).fields}
    assert kept["statistics.scale"] == kept["normalise.0.variance"] == torch.float32
    assert kept["network.conv1.weight"] == torch.bfloat16
    images = batch[0].bfloat16()
    with torch.no_grad():
        small = images, half(images)
    assert_rows_equal_each_alone(
        detector, students, small, Slotted(students[0], detector, SIZE, slots_of(students)), 0.05
    )


def test_the_template_is_left_as_it_is(bank):
    _, students, _, _ = bank
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(students[0]).values())
    assert any(isinstance(module, nn.Conv2d) for module in students[0].modules())


def test_a_module_bound_to_a_row_computes_with_what_the_row_holds(bank, batch):
    detector, students, rows, _ = bank
    layout = SlotLayout.of(students[0])
    row = rows[0].clone()
    bound = copy.deepcopy(students[0])
    bind(bound, layout.views(row))
    for slot in (0, 3):
        row.copy_(rows[slot])
        expected, found = (alone(detector, student, batch, 0)[0] for student in (students[slot], bound))
        assert torch.equal(expected, found)


def test_students_of_trainings_of_different_length_share_slots(teacher):
    def signed(scenes):
        detector = make_detector("associative", SMALL)
        student = detector.build_student(teacher)
        remember(student.memory, torch.Generator().manual_seed(scenes), scenes, code=scenes)
        return signature(prepare(student, torch.device("cpu"), torch.float32), detector, SIZE)

    assert signed(5) == signed(33) == signed(64)
    assert signed(64) != signed(65)


def test_students_share_slots_only_where_nothing_but_numbers_differs(teacher):
    def signed(size=SIZE, **options):
        detector = make_detector("stfpm", {**SMALL, **options})
        return signature(prepare(detector.build_student(teacher), torch.device("cpu"), torch.float32), detector, size)

    assert signed() == signed()
    assert hash(signed()) == hash(signed())
    assert len({signed(), signed(size=96), signed(width=0.25), signed(fusion={"kind": "sum"})}) == 4


@pytest.mark.parametrize("bank", ["stfpm", "associative"], indirect=True)
def test_the_compiler_sees_the_network_whole(bank, batch):
    _, _, _, slotted = bank
    traced = torch.compile(slotted, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, found = judge(slotted, batch), judge(traced, batch)
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())


def faked(module):
    """Bind a module to tensors that claim to lie on a GPU and hold nothing; made within the mode that plays it."""
    there = {
        name: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda")
        for name, each in tensors_of(module).items()
    }
    bind(module, there)
    return module


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by copies of what is not real
@pytest.mark.parametrize("case", ["stfpm", "asymts", "reverse-dense", "efficientad", "associative", "fcl-masked"])
def test_on_a_gpu_nothing_waits_for_the_host_or_is_left_there(case, teacher, monkeypatch):
    """What a capture forbids, tensors of the host and looks at values, a played GPU refuses too."""
    detector = make_detector(*CASES[case])
    student = trained(detector, teacher, 1, torch.float16)
    # The player cannot move modules from one unreal device to another.
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    with FakeTensorMode(), torch.no_grad():
        rows = torch.empty(3, SlotLayout.of(student).nbytes, dtype=torch.uint8, device="cuda")
        slotted = Slotted(faked(student), detector, SIZE, rows)
        images = torch.empty(4, 3, SIZE, SIZE, dtype=torch.float16, device="cuda")
        features = tuple(
            torch.empty(4, count, SIZE // stride, SIZE // stride, dtype=torch.float16, device="cuda")
            for count, stride in zip(teacher.channels, STRIDES, strict=True)
        )
        maps, scores = slotted(images, features, torch.zeros(4, dtype=torch.long, device="cuda"))
    assert (maps.shape, maps.device.type) == ((4, SIZE, SIZE), "cuda")
    assert (scores.shape, scores.device.type) == ((4,), "cuda")
