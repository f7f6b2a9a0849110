"""The memory bank that the students are measured against does what its paper says."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from benchmarks.patchcore import PatchCore, Settings, enlarging, greedy_coreset, reweighted
from models.teachers import load_teacher

SETTINGS = Settings(size=64, coreset=0.5, sigma=0)


@pytest.fixture(scope="module")
def method():
    normal = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    return PatchCore(load_teacher("efficientnet_lite0"), normal, SETTINGS, seed=0), normal


def test_the_coreset_is_the_greedy_one(monkeypatch):
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32))
    distances = torch.cdist(vectors.double(), vectors.double()).numpy()
    expected = [7]
    while len(expected) < 60:
        expected.append(int(distances[expected].min(axis=0).argmax()))
    monkeypatch.setattr("benchmarks.patchcore._CANDIDATES", 16)  # so that it takes many rounds
    monkeypatch.setattr("benchmarks.patchcore._ROWS", 128)
    assert greedy_coreset(vectors, 60, first=7).tolist() == expected


def test_a_coreset_of_everything_holds_each_vector_once():
    vectors = torch.zeros(40, 3)  # all alike: nothing is farther than anything else
    assert sorted(greedy_coreset(vectors, 40, first=0).tolist()) == list(range(40))


def test_enlarging_is_bilinear_and_then_a_gaussian():
    small = np.random.default_rng(2).random((8, 8)).astype(np.float32)
    matrix = enlarging(8, 64, sigma=4).numpy()
    large = cv2.resize(small, (64, 64), interpolation=cv2.INTER_LINEAR)
    expected = cv2.GaussianBlur(large, (33, 33), 4, borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(matrix @ small @ matrix.T, expected, atol=1e-5)


def test_neighbours_are_the_nearest_ones(method):
    bank = method[0].bank
    queries = bank[::3] + 0.05
    distances, rows = method[0].nearest(queries, 2)
    exact = torch.cdist(queries.float(), bank.float())
    torch.testing.assert_close(distances, exact.topk(2, largest=False).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(exact.gather(1, rows), distances, rtol=1e-3, atol=1e-3)


def test_what_was_never_seen_scores_higher(method):
    bank, normal = method
    odd = normal[:1].copy()
    odd[0, 16:40, 16:40] = (255, 0, 0)
    maps, scores = bank.judge(np.concatenate([normal, odd]))
    assert maps.shape == (4, 64, 64)
    assert maps.dtype == scores.dtype == np.float32
    assert scores[3] > 1.5 * scores[:3].max()
    assert np.unravel_index(maps[3].argmax(), (64, 64)) == pytest.approx((28, 28), abs=16)


def test_reweighting_is_equation_7():
    patch, around = np.zeros(3), np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 4]])
    expected = (1 - np.exp(1) / (np.exp(1) + np.exp(2) + np.exp(4))) * 1
    found = reweighted(torch.ones(1), torch.tensor(patch)[None], torch.tensor(around)[None])
    np.testing.assert_allclose(found.numpy(), [expected])


def test_a_reweighted_score_is_at_most_the_worst_patch(method):
    plain, normal = method
    weighted = PatchCore(load_teacher("efficientnet_lite0"), normal, replace(SETTINGS, reweight=True), seed=0)
    maps, _ = plain.judge(255 - normal)
    _, scores = weighted.judge(255 - normal)
    assert ((scores > 0) & (scores < 1.2 * maps.max(axis=(1, 2)))).all()
