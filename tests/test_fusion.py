import cv2
import numpy as np
import pytest
import torch

from models.detector import NormalBatches
from models.detectors import make_detector
from models.errors import ModelError
from models.fusion import MapFusion, smoothed
from models.settings import TrainingSettings
from models.statistics import MapStatistics, MovingAverage
from models.students import ForwardStudent
from models.training import train

FLAT = torch.full((1, 2, 2), 0.5)
RAMP = torch.tensor([[[0.0, 4.0]]]).expand(1, 2, 2)
# Bilinear with half-pixel centres.
RAMP_AT_4 = torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(1, 4, 4)


def statistics(scales=(1.0, 1.0), quantiles=((0.0, 1.0), (0.0, 1.0))) -> MapStatistics:
    made = MapStatistics(len(scales))
    made.scale.copy_(torch.tensor(scales))
    made.quantiles.copy_(torch.tensor(quantiles))
    return made


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        (MapFusion(kind="product"), RAMP_AT_4 * 0.5),
        (MapFusion(kind="sum"), RAMP_AT_4 + 0.5),
        (MapFusion(kind="weighted", weights=(2, 3)), RAMP_AT_4 * 3 + 1.0),
        # 0.5 / 0.25 and ramp / 2
        (MapFusion(kind="normalised"), RAMP_AT_4 / 2 + 2.0),
        # The square root of 0.5 / 0.25 times ramp / 2
        (MapFusion(kind="geometric"), RAMP_AT_4.sqrt()),
        # (2 * (ramp / 2)^3)^(1/4)
        (MapFusion(kind="geometric", weights=(1, 3)), (2 * (RAMP_AT_4 / 2) ** 3) ** 0.25),
        # 0.1 * 0.5 / (1 - 0), and 0.1 * ramp / (4 - 2)
        (MapFusion(kind="quantile"), RAMP_AT_4 * 0.05 + 0.05),
    ],
)
def test_maps_are_joined(fusion, expected):
    known = statistics((0.25, 2.0), ((0.0, 1.0), (2.0, 4.0)))
    fused = fusion.fuse((FLAT, RAMP), 4, known)
    torch.testing.assert_close(fused, expected.expand(1, 4, 4))
    assert fused.dtype == torch.float32


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (0, 0)])
@pytest.mark.parametrize("kind", ["weighted", "geometric"])
def test_every_map_needs_its_weight(kind, weights):
    with pytest.raises(ModelError, match="2 maps need as many weights, not all 0"):
        MapFusion(kind=kind, weights=weights).fuse((FLAT, RAMP), 4, statistics())


def test_a_map_of_weight_0_counts_for_nothing():
    alone = MapFusion(kind="geometric").fuse((RAMP,), 4, statistics((2.0,), ((0.0, 1.0),)))
    both = MapFusion(kind="geometric", weights=(0, 5)).fuse((FLAT * 0, RAMP), 4, statistics((1.0, 2.0)))
    torch.testing.assert_close(both, alone)
    assert torch.isfinite(both).all()


def test_naming_a_part_of_the_fusion_leaves_the_rest_to_the_method():
    detector = make_detector("reverse", {"fusion": {"smoothing": 1.0}})
    assert (detector.fusion.kind, detector.fusion.smoothing) == ("sum", 1.0)


def test_a_training_refuses_weights_before_it_begins():
    options = {"fusion": {"kind": "weighted", "weights": [1]}}
    settings = TrainingSettings(detector="stfpm", detector_options=options, input_size=64)
    with pytest.raises(ModelError, match="3 maps need as many weights"):
        train(np.zeros((2, 64, 64, 3), np.uint8), settings, progress=lambda *step: pytest.fail("it began"))


def test_scores():
    fused = torch.zeros(2, 10, 10)
    fused[0, 1, 2], fused[0, 3, 3], fused[1, 0, 0] = 7.0, 3.0, 0.25
    assert MapFusion().score_of(fused).tolist() == [7.0, 0.25]
    # Two of a hundred pixels.
    assert MapFusion(score="top", top=0.02).score_of(fused).tolist() == [5.0, 0.125]
    # Fewer than one pixel is one.
    assert MapFusion(score="top", top=0.001).score_of(fused).tolist() == [7.0, 0.25]


@pytest.mark.parametrize("sigma", [0.7, 2.0, 4.0])
def test_smoothing_is_a_gaussian(sigma):
    maps = torch.rand(2, 48, 48, generator=torch.Generator().manual_seed(0))
    side = 2 * round(4 * sigma) + 1
    expected = [cv2.GaussianBlur(each.numpy(), (side, side), sigma, borderType=cv2.BORDER_REFLECT_101) for each in maps]
    np.testing.assert_allclose(smoothed(maps, sigma).numpy(), np.stack(expected), atol=1e-5)


def test_statistics_are_those_of_all_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(3, 8, 8, generator=generator), torch.rand(3, 4, 4, generator=generator)) for _ in range(4)]
    measured = MapStatistics(2)
    measured.measure(batches)
    for index in range(2):
        values = torch.cat([batch[index].flatten() for batch in batches])
        assert measured.scale[index] == pytest.approx(float(values.mean()), rel=1e-6)
        low, high = measured.quantiles[index].tolist()
        assert float((values <= low).float().mean()) == pytest.approx(0.9, abs=0.01)
        assert float((values <= high).float().mean()) == pytest.approx(0.995, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["normalised", "quantile"])
def test_maps_without_spread_give_finite_scores(value, kind):
    measured = MapStatistics(1)
    measured.measure([(torch.full((2, 4, 4), value),)])
    fused = MapFusion(kind=kind).fuse((torch.full((1, 4, 4), value + 1),), 8, measured)
    assert torch.isfinite(fused).all()
    assert float(fused.min()) > 0


def test_statistics_are_never_rounded_to_the_networks_precision():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), statistics((1 / 3, 1 / 7)))
    half = network.to(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16
    assert half[1].scale.dtype == torch.float32
    assert half[1].scale.tolist() == pytest.approx([1 / 3, 1 / 7], abs=1e-7)


class Batches(NormalBatches):
    """Random features of two channels with their own mean and spread, at three scales."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        scale, shift = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1), torch.tensor([5.0, -1.0]).view(1, 2, 1, 1)
        drawn = (torch.randn(count, 2, side, side, generator=generator) for side in (16, 8, 4))
        self.features = tuple(each * scale + shift for each in drawn)

    def __len__(self) -> int:
        return len(self.features[0])

    def batch(self, indices):
        return torch.zeros(len(indices), 3, 64, 64), tuple(each[indices] for each in self.features)

    def chunks(self):
        return list(torch.arange(len(self)).split(4))


def test_moving_averages_settle_before_the_training_and_are_frozen_in_it():
    source = Batches(400)
    student = ForwardStudent((2, 2, 2), lambda images: source.batch(torch.arange(400))[1], momentum=0.02).train()
    student.begin(source)
    frozen = {name: value.clone() for name, value in student.state_dict().items()}
    images, features = source.batch(torch.arange(400))
    for pair in student(images, features):
        # Of 5 with variance 4, and -1 with variance 0.25; a tenth of their mean is added to each.
        assert pair.target.mean(dim=(0, 2, 3)).tolist() == pytest.approx([5 / 4.2125**0.5, -1 / 0.4625**0.5], abs=0.1)
        assert pair.target.std(dim=(0, 2, 3)).tolist() == pytest.approx([2 / 4.2125**0.5, 0.5 / 0.4625**0.5], abs=0.1)
    assert all(torch.equal(value, frozen[name]) for name, value in student.state_dict().items())


def test_moving_variance_is_that_of_all_images_however_they_come():
    source = Batches(12).features[0]
    average = MovingAverage(2, momentum=0.001)
    for batch in source.split(4):
        average.update(batch)
    torch.testing.assert_close(average.mean, source.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(average.variance, source.var(dim=(0, 2, 3), correction=0))


def test_moving_average_takes_the_first_batch_in_full():
    average = MovingAverage(1, momentum=0.01)
    average.update(torch.full((1, 1, 2, 2), 3.0))
    assert average.mean.item() == pytest.approx(3.0)
    # The second weighs as much as the first, whatever the momentum.
    average.update(torch.full((1, 1, 2, 2), 5.0))
    assert average.mean.item() == pytest.approx(4.0)


def test_a_channel_that_never_varies_gives_finite_features():
    average = MovingAverage(1, momentum=0.1)
    average.update(torch.full((2, 1, 4, 4), 7.0))
    assert torch.isfinite(average(torch.full((1, 1, 4, 4), 8.0))).all()
