import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from models.metrics import image_auroc, pixel_auroc, roc_curve


def by_pairs(scores, labels):
    pairs = [(defect, good) for defect in scores[labels] for good in scores[~labels]]
    return sum(1.0 if defect > good else 0.5 if defect == good else 0.0 for defect, good in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_image_auroc_against_all_pairs(seed, distinct):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, distinct, 40).astype(np.float32)
    labels = generator.random(40) < 0.3
    assert image_auroc(scores, labels) == pytest.approx(by_pairs(scores, labels), abs=1e-12)


def test_known_values():
    labels = np.array([False, False, True, True])
    assert image_auroc(np.array([1.0, 2, 3, 4]), labels) == 1.0
    assert image_auroc(np.array([4.0, 3, 2, 1]), labels) == 0.0
    assert image_auroc(np.ones(4), labels) == 0.5
    assert image_auroc(np.array([1.0, 3, 2, 4]), labels) == 0.75


def test_one_kind_has_no_auroc():
    assert image_auroc(np.ones(3), np.zeros(3, bool)) is None
    assert image_auroc(np.ones(3), np.ones(3, bool)) is None
    assert pixel_auroc([np.ones((2, 2))], [np.zeros((2, 2), bool)]) is None
    assert pixel_auroc([], []) is None


@pytest.mark.parametrize("quantised", [False, True])
def test_pixel_auroc_against_all_pixels_at_once(quantised):
    generator = np.random.default_rng(0)
    maps = generator.random((7, 16, 12)).astype(np.float32)
    if quantised:
        maps = np.round(maps * 8) / 8
    masks = generator.random((7, 16, 12)) < 0.05
    masks[2] = False
    assert pixel_auroc(list(maps), list(masks)) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_roc_points():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 10, 60).astype(np.float64)
    labels = generator.random(60) < 0.4
    curve = roc_curve(scores, labels)
    false_positive_rate, true_positive_rate, thresholds = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, false_positive_rate)
    np.testing.assert_allclose(curve.true_positive_rate, true_positive_rate)
    np.testing.assert_allclose(curve.thresholds, thresholds)
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(image_auroc(scores, labels))
