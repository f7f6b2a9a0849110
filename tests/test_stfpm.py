import math

import pytest
import torch
import torchvision

from models.backbones import ResNetBackbone
from models.detector import Pair
from models.detectors import DETECTORS, make_detector
from models.errors import ModelError
from models.inference import pick_device
from models.statistics import MapStatistics
from models.stfpm import STFPM


def pairs(*values: tuple[list, list]) -> tuple[Pair, ...]:
    return tuple(Pair(*(torch.tensor(side, dtype=torch.float32) for side in value)) for value in values)


# One image, two channels, a 1 x 2 map at every scale: (3, 4) against (4, 3), and (1, 0) against (0, 2).
THEIRS = [[[[3.0, 1.0]], [[4.0, 0.0]]]]
OWN = [[[[4.0, 0.0]], [[3.0, 2.0]]]]
# (0.6, 0.8) - (0.8, 0.6): half of 0.04 + 0.04; (1, 0) - (0, 1): half of 1 + 1.
DISTANCES = [0.04, 1.0]


def test_distances_are_those_of_the_normalised_features():
    maps = STFPM().scale_maps(pairs((THEIRS, OWN)))
    assert maps[0].shape == (1, 1, 2)
    assert maps[0].flatten().tolist() == pytest.approx(DISTANCES, abs=1e-6)


def test_loss_is_a_mean_over_positions_summed_over_scales():
    loss = STFPM().loss(pairs((THEIRS, OWN), (THEIRS, OWN), (THEIRS, THEIRS)))
    assert loss.item() == pytest.approx(2 * (0.04 + 1.0) / 2, abs=1e-6)


def test_hardest_positions_alone_count():
    half = STFPM(hardest=0.5).loss(pairs((THEIRS, OWN)))
    assert half.item() == pytest.approx(1.0, abs=1e-6)
    # A fraction is rounded up, so there is always a position left.
    tiny = STFPM(hardest=0.001).loss(pairs((THEIRS, OWN)))
    assert tiny.item() == pytest.approx(1.0, abs=1e-6)


def test_hardest_positions_are_taken_from_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    pair = Pair(*(torch.randn(4, 8, 5, 5, generator=generator) for _ in range(2)))
    distances = STFPM().scale_maps((pair,))[0].flatten().sort(descending=True).values
    torch.testing.assert_close(STFPM(hardest=0.1).loss((pair,)), distances[: math.ceil(0.1 * 100)].mean())


def test_a_scale_that_agrees_silences_the_product():
    maps = STFPM().scale_maps(pairs((THEIRS, OWN), (THEIRS, THEIRS)))
    assert STFPM().fuse(maps, 8, MapStatistics(2)).abs().max() == 0


def test_half_precision_features_are_compared_in_float32():
    theirs = torch.tensor([[[[1.0]], [[0.0]]]], dtype=torch.bfloat16)
    own = torch.tensor([[[[1.0]], [[0.0078125]]]], dtype=torch.bfloat16)
    distance = STFPM().scale_maps((Pair(theirs, own),))[0]
    assert distance.dtype == torch.float32
    # 1 - cos for an angle of 0.0078 rad; computed in bfloat16 it would be 0.
    assert distance.item() == pytest.approx(0.0078125**2 / 2, rel=1e-2)


def test_dead_features_give_no_nan():
    zero = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = STFPM().loss((Pair(torch.zeros(1, 4, 2, 2), zero),))
    loss.backward()
    assert loss.item() == 0
    assert zero.grad.isfinite().all()


def test_full_width_student_is_resnet18_to_the_letter():
    student = ResNetBackbone((64, 128, 256), width=1.0)
    network = torchvision.models.resnet18(weights=None)
    own = student.state_dict()
    theirs = {key: value for key, value in network.state_dict().items() if key in own}
    assert list(theirs) == list(own)
    student.load_state_dict(theirs)
    images = torch.randn(1, 3, 64, 64)
    student.eval(), network.eval()
    with torch.inference_mode():
        stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        low = network.layer1(stem)
        middle = network.layer2(low)
        for feature, expected in zip(student(images), (low, middle, network.layer3(middle)), strict=True):
            torch.testing.assert_close(feature, expected)


def test_options_are_checked_and_recorded():
    detector = make_detector("stfpm", {"width": 0.5})
    assert make_detector(detector.name, detector.model_dump()) == detector
    with pytest.raises(ModelError, match="Known: associative, asymts, efficientad, fcl, reverse, stfpm"):
        make_detector("nothing")
    with pytest.raises(ModelError, match=r"option 'hardest'.*found 0"):
        make_detector("stfpm", {"hardest": 0})
    with pytest.raises(ModelError, match='unknown option: "widht"; did you mean "width"'):
        make_detector("stfpm", {"widht": 0.5})
    assert DETECTORS["stfpm"] is STFPM


def test_devices_are_checked():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="unknown device 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ModelError, match="CUDA devices"):
        pick_device("cuda:99")
