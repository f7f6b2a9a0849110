"""What every detector promises, whatever its method."""

import copy

import numpy as np
import pytest
import torch

from models.backbones import ResNetBackbone
from models.detector import Pair
from models.detectors import DETECTORS, make_detector
from models.errors import ModelError
from models.inference import infer, prepare, to_input
from models.registry import Registry
from models.settings import TrainingSettings
from models.teachers import STRIDES, load_teacher
from models.training import train
from models.versions import draft_card, restore

CPU = torch.device("cpu")
WAYS = {
    "stfpm": ("stfpm", {"width": 0.125}),
    "asymts": ("asymts", {"width": 0.125}),
    "asymts plain": ("asymts", {"width": 0.125, "blocks": "plain", "momentum": None}),
    "reverse": ("reverse", {"width": 0.125}),
    "reverse dense": ("reverse", {"width": 0.125, "bottleneck": "dense", "embedding": 16, "scales": 2}),
    "efficientad": ("efficientad", {"width": 0.125, "embedding": 16}),
    "associative": ("associative", {"width": 0.125, "components": 8, "neighbours": 4}),
    "fcl softmax": ("fcl", {"host_options": {"width": 0.125}, "snc": {"form": "softmax"}}),
    "fcl uniform": ("fcl", {"host_options": {"width": 0.125}, "snc": {"form": "uniform", "radius": 2}}),
    "fcl relation": ("fcl", {"host": "asymts", "host_options": {"width": 0.125}, "snc": {"form": "relation"}}),
    "fcl masked": ("fcl", {"host": "reverse", "host_options": {"width": 0.125}, "snc": {"form": "masked"}}),
    "fcl masked in the loss": (
        "fcl",
        {"host_options": {"width": 0.125}, "snc": {"form": "masked", "place": "loss"}},
    ),
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("efficientnet_lite0")


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    """Stripes of random phase under noise, (24, 64, 64, 3) uint8."""
    generator = np.random.default_rng(0)
    x = np.arange(64)
    stripes = [128 + 60 * np.sin(x / 3 + phase) for phase in generator.uniform(0, 6, 24)]
    images = np.stack(stripes)[:, None, :, None] + generator.normal(0, 4, (24, 64, 64, 3))
    return images.clip(0, 255).astype(np.uint8)


def inputs_of(images: np.ndarray, teacher) -> torch.Tensor:
    return to_input(torch.from_numpy(images), teacher, torch.float32)


@pytest.fixture(params=WAYS, ids=list(WAYS))
def way(request):
    name, options = WAYS[request.param]
    return make_detector(name, options)


def settings(detector) -> TrainingSettings:
    return TrainingSettings(
        detector=detector.name, detector_options=detector.model_dump(), input_size=64, steps=6, batch_size=4
    )


def test_every_detector_is_tried_here():
    assert {name for name, _ in WAYS.values()} == set(DETECTORS)


def test_pairs_are_the_teachers_shapes_and_maps_are_distances(way, teacher):
    student = way.build_student(teacher).eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pairs = student(images, teacher(images))
        maps = way.scale_maps(pairs)
    # An empty memory has a grid of one cell.
    sizes = {96 // stride for stride in STRIDES} | ({1} if way.name == "associative" else set())
    for pair in pairs:
        assert pair.target.shape == pair.prediction.shape
        assert pair.target.shape[-1] in sizes
    assert len(maps) == len(student.statistics.scale)
    for each in maps:
        assert each.dtype == torch.float32
        assert float(each.min()) >= 0


def test_a_training_lowers_the_loss_and_the_version_comes_back_whole(way, normals, teacher, tmp_path):
    trained = train(normals, settings(way), teacher=teacher)
    assert trained.history[-1] < trained.history[0]
    assert np.isfinite(trained.calibration.threshold)
    registry = Registry(tmp_path)
    card = registry.publish(draft_card(trained, "stripes", [], []), trained.student)
    detector, student = restore(*registry.load_student("stripes", card.version), teacher)
    assert detector == way
    inputs = inputs_of(normals[:3], teacher)
    with torch.inference_mode():
        features = teacher(inputs)
        before = infer(way, trained.student, inputs, features)
        after = infer(detector, student, inputs, features)
    # Same weights; only the memory layout may differ, and with it the last digits.
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(before[0].max()))


def test_a_training_can_start_from_a_version(way, normals, teacher):
    first = train(normals, settings(way), teacher=teacher)
    state = copy.deepcopy(first.student.state_dict())
    again = train(normals, settings(way).model_copy(update={"steps": 1}), start_from=state, teacher=teacher)
    assert again.history[0] < first.history[0]


def test_each_image_is_judged_alone_and_prepared_students_agree(way, normals, teacher):
    trained = train(normals[:6], settings(way), teacher=teacher)
    ready_teacher, ready = prepare(teacher, CPU, torch.float32), prepare(trained.student, CPU, torch.float32)
    inputs = inputs_of(normals[:3], teacher)
    with torch.inference_mode():
        maps, scores = infer(way, ready, inputs, ready_teacher(inputs))
        alone, score = infer(way, ready, inputs[1:2], ready_teacher(inputs[1:2]))
        plain, _ = infer(way, trained.student, inputs, teacher(inputs))
    assert maps.shape == (3, 64, 64)
    assert maps.dtype == scores.dtype == torch.float32
    largest = float(maps.max())
    torch.testing.assert_close(maps[1:2], alone, rtol=1e-3, atol=1e-4 * largest)
    torch.testing.assert_close(scores[1:2], score, rtol=1e-3, atol=1e-4 * largest)
    torch.testing.assert_close(maps, plain, rtol=1e-2, atol=2e-3 * largest)


def test_options_are_recorded_and_nested_ones_checked():
    detector = make_detector("fcl", {"snc": {"form": "uniform", "radius": 2}, "fusion": {"kind": "sum"}})
    assert make_detector("fcl", detector.model_dump()) == detector
    with pytest.raises(ModelError, match=r"detector fcl, option 'snc.radius'.*found 9"):
        make_detector("fcl", {"snc": {"radius": 9}})
    with pytest.raises(ModelError, match=r"detector fcl.*widht"):
        make_detector("fcl", {"host_options": {"widht": 1}})
    with pytest.raises(ModelError, match=r"'fusion.kind'"):
        make_detector("stfpm", {"fusion": {"kind": "median"}})


def test_a_dense_student_cannot_give_back_what_it_never_saw(teacher, normals):
    """A spot on an image changes the map there, since one vector holds normal images only."""
    way = {"width": 0.25, "bottleneck": "dense", "embedding": 32, "scales": 2}
    how = TrainingSettings(detector="reverse", detector_options=way, input_size=64, steps=60, batch_size=8)
    trained = train(normals, how, teacher=teacher)
    spotted = normals[:4].copy()
    spotted[:, 20:36, 28:44] = 255
    with torch.inference_mode():
        inputs, clean = inputs_of(spotted, teacher), inputs_of(normals[:4], teacher)
        maps, scores = infer(trained.detector, trained.student, inputs, teacher(inputs))
        _, clean_scores = infer(trained.detector, trained.student, clean, teacher(clean))
    assert float(scores.min()) > float(clean_scores.max())
    for each in maps:
        row, column = divmod(int(each.argmax()), 64)
        assert 12 <= row <= 44
        assert 20 <= column <= 52


def test_narrow_students_keep_the_teachers_shapes(teacher):
    backbone = ResNetBackbone(teacher.channels, 0.25)
    images = torch.zeros(2, 3, 64, 64)
    for own, theirs in zip(backbone(images), teacher(images), strict=True):
        assert own.shape == theirs.shape


def test_pairs_hold_target_and_prediction():
    pair = Pair(torch.zeros(1), torch.ones(1))
    assert (pair.target.item(), pair.prediction.item()) == (0.0, 1.0)
