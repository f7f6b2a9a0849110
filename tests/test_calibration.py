import math

import numpy as np
import pytest
from scipy import stats

from models.calibration import calibrate, is_fail, student_t_quantile
from models.errors import ModelError


def test_verdict_rule():
    assert not is_fail(0.5, threshold=0.5)
    assert is_fail(0.50001, threshold=0.5)
    # No answer is never a pass.
    assert is_fail(math.nan, threshold=0.5)


def test_conformal_quantile_of_a_hundred_scores():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    # k = ceil(100 * 0.95) = 95 of 99 scores.
    assert calibrate(scores, 0.05).threshold == 95.0
    assert calibrate(scores, 0.01).threshold == 99.0
    # One in a thousand is beyond what 99 scores can say.
    assert calibrate(scores, 0.001).threshold > 99.0


@pytest.mark.parametrize("count", [20, 150])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_promised_rate_is_kept_on_average(count, rate):
    generator = np.random.default_rng(count)
    rejected = []
    for _ in range(400):
        normals = np.exp(generator.normal(-4, 0.6, count + 200))
        threshold = calibrate(normals[:count], rate).threshold
        rejected.append((normals[count:] > threshold).mean())
    assert np.mean(rejected) <= rate * 1.25
    assert np.mean(rejected) >= rate * 0.25


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_scores_is_not_trusted(count):
    scores = [0.010, 0.011, 0.0105, 0.0102, 0.0108][:count]
    threshold = calibrate(scores, 0.01).threshold
    assert 1.5 * max(scores) < threshold < 1000 * max(scores)


def test_scale_of_scores_does_not_matter():
    scores = np.random.default_rng(1).lognormal(size=12)
    assert calibrate(scores * 1e-6, 0.02).threshold == pytest.approx(calibrate(scores, 0.02).threshold * 1e-6)


def test_identical_and_zero_scores():
    assert calibrate([0.2] * 10, 0.01).threshold > 0.2
    zero = calibrate([0.0] * 10, 0.01)
    assert 0 < zero.threshold < 1e-30


def test_scores_are_kept_in_order():
    calibration = calibrate([3.0, 1.0, 2.0], 0.1)
    assert calibration.scores == [1.0, 2.0, 3.0]
    assert calibration.false_reject_rate == 0.1


@pytest.mark.parametrize("scores", [[], [math.nan], [1.0, math.inf], [-1.0]])
def test_useless_scores_are_refused(scores):
    with pytest.raises(ModelError, match="calibration"):
        calibrate(scores, 0.01)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 101, 1000])
@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9, 0.99, 0.9999])
def test_t_quantile_against_scipy(probability, freedom):
    expected = stats.t.ppf(probability, freedom)
    assert student_t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("zero", [0.0, 1e-30])
def test_a_copy_of_a_training_image_among_the_held_out_does_not_open_the_threshold(zero):
    scores = [0.09, 0.1, 0.1, 0.11, 0.1, 0.12, 0.09, 0.1, 0.11]
    without, with_copy = calibrate(scores, 0.01).threshold, calibrate([zero, *scores], 0.01).threshold
    assert without <= with_copy < 100 * 0.1
