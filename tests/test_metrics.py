import tracemalloc
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from skimage.measure import label as label_regions
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from models.errors import ModelError
from models.metrics import aupro, average_precision, image_auroc, pixel_auroc, roc_curve


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


def test_one_kind_has_no_figure():
    for measure in (image_auroc, average_precision):
        assert measure(np.ones(3), np.zeros(3, bool)) is None
        assert measure(np.ones(3), np.ones(3, bool)) is None
        assert measure(np.ones(0), np.ones(0, bool)) is None
    for measure in (pixel_auroc, aupro):
        assert measure([], []) is None
        assert measure([np.ones((2, 2))], [np.zeros((2, 2), bool)]) is None
        assert measure([np.ones((2, 2))], [np.ones((2, 2), bool)]) is None
        assert measure([np.ones((2, 2))], [None]) is None


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


# --- average precision


def test_average_precision_by_hand():
    # 4: 1 of 1 right, recall 0 -> 1/3. The tie at 3 is one threshold: 2 of 3 right, recall 1/3 -> 2/3.
    # 1: 3 of 5 right, recall 2/3 -> 1. (1 + 2/3 + 3/5) / 3 = 34/45
    scores = np.array([4.0, 3, 3, 2, 1])
    assert average_precision(scores, np.array([1, 1, 0, 0, 1], bool)) == pytest.approx(34 / 45, abs=1e-15)
    assert average_precision(scores, np.array([1, 0, 0, 0, 0], bool)) == 1.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_average_precision_against_sklearn(seed, distinct):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, distinct, 50).astype(np.float32)
    labels = generator.random(50) < 0.3
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


# --- area under the per-region overlap curve


def by_all_thresholds(maps, masks, limit):
    """The definition, word by word: every distinct score is a threshold, areas are trapezoids."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels = label_regions(mask, connectivity=2)
        regions += [scores[labels == number] for number in range(1, labels.max() + 1)]
    normal = np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)])
    x0 = y0 = area = 0.0
    for threshold in sorted({float(value) for scores in maps for value in scores.ravel()}, reverse=True):
        x1 = float((normal >= threshold).mean())
        y1 = float(np.mean([(region >= threshold).mean() for region in regions]))
        if x1 > limit:
            y_end = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            return (area + (limit - x0) * (y0 + y_end) / 2) / limit
        area += (x1 - x0) * (y0 + y1) / 2
        x0, y0 = x1, y1
    return area / limit


def random_maps(seed, distinct=None):
    """Maps with blobs that score higher, of other sizes than their masks, (image, mask) sizes differing in the set."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for _ in range(int(generator.integers(1, 5))):
        mask = generator.random(generator.integers(2, 14, 2)) < generator.choice([0, 0.1, 0.4])
        scores = generator.random(generator.integers(2, 14, 2) if generator.random() < 0.7 else mask.shape)
        scores += cv2.resize(mask.astype(float), scores.shape[::-1]) * generator.choice([0, 0.3])
        maps.append((scores if distinct is None else np.round(scores * distinct) / distinct).astype(np.float32))
        masks.append(mask)
    masks[0][0, :2] = True, False
    return maps, masks


def enlarged(maps, masks):
    return [cv2.resize(scores, mask.shape[::-1]) for scores, mask in zip(maps, masks, strict=True)]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("distinct", [None, 8, 2])
def test_pixels_against_the_definition(seed, distinct):
    maps, masks = random_maps(seed, distinct)
    limits = (0.01, 0.05, 0.3, 0.77, 1.0)
    own_size = enlarged(maps, masks)
    expected = {limit: by_all_thresholds(own_size, masks, limit) for limit in limits}
    assert aupro(maps, masks, limits) == pytest.approx(expected, abs=1e-12)
    labels, scores = (np.concatenate([each.ravel() for each in images]) for images in (masks, own_size))
    assert pixel_auroc(maps, masks) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_aupro_by_hand():
    # Regions: a pair (9, 5) and a single pixel (7). Normal: 8, 6, 5, 1, so each adds 1/4 to the x axis.
    mask = np.array([[1, 1, 0, 1, 0, 0, 0]], bool)
    scores = np.array([[9, 5, 8, 7, 6, 5, 1]], np.float32)
    # Points: 9 (0, 1/4), 8 (1/4, 1/4), 7 (1/4, 3/4), 6 (2/4, 3/4), the tie at 5 (3/4, 1), 1 (1, 1).
    expected = {
        1.0: 1 / 16 + 3 / 16 + 7 / 32 + 1 / 4,
        0.5: (1 / 16 + 3 / 16) / 0.5,
        0.3: (1 / 16 + 0.05 * 3 / 4) / 0.3,  # cut in a level stretch
        0.1: 1 / 4,  # cut before the first normal pixel's point
        0.6: (1 / 4 + 0.1 * (0.75 + 0.85) / 2) / 0.6,  # cut in the tie: y is 3/4 + 1/4 * 0.1 / 0.25 = 0.85
    }
    assert aupro([scores], [mask], tuple(expected)) == pytest.approx(expected, abs=1e-15)


def test_touching_corners_are_one_region_and_regions_weigh_the_same():
    mask = np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]], bool)
    scores = np.array([[9, 5, 5, 5, 1], [5, 9, 5, 5, 5]], np.float32)
    # The pair is found before any normal pixel, the single one after all: 1/2. As three regions it would be 2/3.
    assert aupro([scores], [mask], (1.0, 0.05)) == {1.0: 0.5, 0.05: 0.5}


def test_regions_of_all_images_weigh_the_same():
    # Three regions, one in the first image and two in the second; only the first's is found: 1/3, not (1 + 0) / 2.
    masks = [np.array([[1, 1, 0]], bool), np.array([[1, 0, 1]], bool)]
    maps = [np.array([[9, 9, 5]], np.float32), np.array([[1, 5, 1]], np.float32)]
    assert aupro(maps, masks) == pytest.approx({0.3: 1 / 3, 0.05: 1 / 3}, abs=1e-15)


def test_perfect_and_constant_maps():
    masks = [np.random.default_rng(0).random((30, 40)) < 0.3, np.zeros((9, 7), bool), None]
    perfect = [masks[0].astype(np.float32), np.zeros((9, 7), np.float32), np.zeros((5, 5), np.float32)]
    assert aupro(perfect, masks) == {0.3: 1.0, 0.05: 1.0}
    assert pixel_auroc(perfect, masks) == 1.0
    # One threshold: the curve is the diagonal, its area up to L is L * L / 2, by L.
    constant = [np.full_like(scores, 0.1) for scores in perfect]
    assert aupro(constant, masks) == pytest.approx({0.3: 0.15, 0.05: 0.025}, abs=1e-15)
    assert pixel_auroc(constant, masks) == 0.5


def test_single_pixel_regions_make_aupro_the_auroc():
    generator = np.random.default_rng(0)
    mask = np.zeros((20, 20), bool)
    mask[::2, ::2] = generator.random((10, 10)) < 0.5
    scores = np.round(generator.random((20, 20)) * 16).astype(np.float32)
    assert aupro([scores], [mask], (1.0,))[1.0] == pytest.approx(pixel_auroc([scores], [mask]), abs=1e-12)


# --- each image at its mask's size


def test_maps_are_resized_to_their_masks():
    # 0 1 becomes 0 1/4 3/4 1: the defect beats one of three normal pixels. Repeated pixels would tie it: 1/6.
    up = [np.array([[0, 1]], np.float32)], [np.array([[0, 1, 0, 0]], bool)]
    assert pixel_auroc(*up) == 1 / 3
    assert aupro(*up, (1.0,)) == {1.0: pytest.approx(1 / 3)}
    # 0 4 4 0 becomes 2 2.
    down = [np.array([[0, 4, 4, 0]], np.float32)], [np.array([[1, 0]], bool)]
    assert pixel_auroc(*down) == 0.5
    assert aupro(*down, (1.0,)) == {1.0: 0.5}


def test_no_mask_is_a_defect_free_image_at_its_maps_size():
    maps, masks = random_maps(3)
    normal = np.random.default_rng(0).random((7, 5)).astype(np.float32)
    for measure in (pixel_auroc, aupro):
        assert measure([*maps, normal], [*masks, None]) == measure([*maps, normal], [*masks, np.zeros((7, 5), bool)])


def test_masks_may_be_numbers_and_maps_one_stack_of_any_float():
    generator = np.random.default_rng(0)
    stack = np.round(generator.random((3, 8, 8)) * 64).astype(np.float32)
    masks = [generator.random((16, 16)) < 0.1 for _ in stack]
    for measure in (pixel_auroc, aupro):
        expected = measure(list(stack), masks)
        assert measure(stack, [np.uint8(255) * mask for mask in masks]) == expected
        for dtype in (np.float16, np.float64):
            assert measure(stack.astype(dtype), masks) == expected


class Reread(Sequence):
    """Makes each array anew when asked for it, and counts."""

    def __init__(self, make, length):
        self.make, self.length, self.reads = make, length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        self.reads += 1
        return self.make(index)


def blob(index):
    return cv2.circle(np.zeros((512, 512), np.uint8), (8 * index, 256), 25, 1, -1).astype(bool)


@pytest.mark.parametrize(("measure", "bytes_for_defective"), [(pixel_auroc, 8), (aupro, 50)])
def test_memory_is_that_of_the_defective_pixels_and_one_image(measure, bytes_for_defective):
    maps = np.random.default_rng(0).random((48, 64, 64)).astype(np.float32)
    masks = Reread(blob, 48)
    defective = sum(int(mask.sum()) for mask in masks)
    masks.reads = 0
    tracemalloc.start()
    try:
        assert measure(maps, masks) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert masks.reads == 2 * 48
    assert peak < bytes_for_defective * defective + 30 * 512 * 512 + 2**20
    assert peak < 48 * 512 * 512 * 4 / 3  # of all enlarged maps


# --- what cannot be measured


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(value):
    scores, labels = np.array([0.5, value, 0.1]), np.array([True, False, False])
    for measure in (image_auroc, average_precision, roc_curve):
        with pytest.raises(ModelError, match=r"^a score is NaN or infinite[^\n]*$"):
            measure(scores, labels)
    with pytest.raises(ModelError):
        average_precision(scores, np.zeros(3, bool))
    maps = [np.zeros((6, 6), np.float32) for _ in range(3)]
    maps[2][0, 0] = value  # a pixel that shrinking to 2 x 2 does not read
    mask = np.array([[1, 0], [0, 0]], bool)
    for measure in (pixel_auroc, aupro):
        for last in (mask, None):
            with pytest.raises(ModelError, match=r"^anomaly map 3 of 3 is NaN or infinite[^\n]*$"):
                measure(maps, [mask, mask, last])


def test_maps_and_masks_that_do_not_match_are_refused():
    mask = np.array([[1, 0]], bool)
    for measure in (pixel_auroc, aupro):
        with pytest.raises(ModelError, match="2 anomaly maps cannot be judged by 1 masks"):
            measure([np.ones((1, 2))] * 2, [mask])
        with pytest.raises(ModelError, match=r"anomaly map 2 and its mask must be \(H, W\)"):
            measure([np.ones((1, 2))] * 2, [mask, np.zeros((1, 2, 3), bool)])


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, float("nan")])
def test_limits_out_of_range_are_refused(limit):
    with pytest.raises(ModelError, match="limits above 0 and up to 1"):
        aupro([np.ones((1, 2))], [np.array([[1, 0]], bool)], (0.3, limit))
