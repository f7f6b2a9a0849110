import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.detectors import make_detector
from models.errors import ModelError, TrainingDataError, TrainingStoppedError, VersionError
from models.evaluation import judge
from models.features import TeacherFeatures
from models.holdout import split_holdout
from models.images import TrainingImage, list_images, read_training_images
from models.inference import prepare
from models.metrics import image_auroc, pixel_auroc
from models.registry import Registry
from models.settings import RECIPES, TrainingSettings, recipe, recipe_changes
from models.teachers import load_teacher
from models.training import train
from models.versions import draft_card, restore

QUICK = TrainingSettings(input_size=64, steps=60, device="cpu")
ELPV = Path(__file__).parents[2] / "shared/data/elpv_mono"


def texture(generator: np.random.Generator) -> np.ndarray:
    """A woven pattern at a random phase with sensor noise, (64, 64, 3) uint8."""
    y, x = np.mgrid[:64, :64]
    phase = generator.uniform(0, 2 * np.pi, 2)
    weave = np.sin(x / 2 + phase[0]) * np.sin(y / 3 + phase[1])
    grey = 128 + 60 * weave + generator.normal(0, 4, weave.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def defective(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A texture with a flat patch, and where it is."""
    image, mask = texture(generator), np.zeros((64, 64), bool)
    top, left = generator.integers(8, 40, 2)
    mask[top : top + 14, left : left + 14] = True
    image[mask] = 128
    return image, mask


@pytest.fixture(scope="module")
def normals():
    generator = np.random.default_rng(0)
    return np.stack([texture(generator) for _ in range(40)])


@pytest.fixture(scope="module")
def trained(normals):
    return train(normals, QUICK)


@pytest.fixture(scope="module")
def labelled():
    generator = np.random.default_rng(1)
    good = [(texture(generator), np.zeros((64, 64), bool)) for _ in range(20)]
    bad = [defective(generator) for _ in range(20)]
    images, masks = zip(*good, *bad, strict=True)
    return np.stack(images), list(masks), np.repeat([False, True], 20)


def test_planted_defects_are_found_and_located(trained, labelled):
    images, masks, labels = labelled
    maps, scores, _ = judge(trained, images)
    assert image_auroc(scores, labels) >= 0.95
    assert pixel_auroc(list(maps), masks) >= 0.9
    fails = scores > trained.calibration.threshold
    assert fails[~labels].mean() <= 0.1


def test_the_loss_falls(trained):
    assert len(trained.history) == QUICK.steps
    assert np.mean(trained.history[-10:]) < 0.7 * np.mean(trained.history[:10])


def test_the_same_seed_gives_the_same_student(normals, trained):
    state = torch.random.get_rng_state()
    again = train(normals, QUICK)
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.history == trained.history
    assert again.calibration == trained.calibration
    for key, value in again.student.state_dict().items():
        assert torch.equal(value, trained.student.state_dict()[key]), key
    other = train(normals, QUICK.model_copy(update={"seed": 1, "steps": 10}))
    assert other.history != trained.history[:10]


def test_cached_features_are_the_computed_ones(normals):
    teacher = prepare(load_teacher("efficientnet_lite0"), torch.device("cpu"), torch.float32)
    cached = TeacherFeatures(teacher, normals, cache_bytes=2**30)
    computed = TeacherFeatures(teacher, normals, cache_bytes=0)
    indices = torch.tensor([7, 0, 7, 39])
    images, features = cached.batch(indices)
    again, expected = computed.batch(indices)
    assert torch.equal(images, again)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for feature, other in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-4)
        assert feature.is_contiguous(memory_format=torch.channels_last)


def test_warm_start_goes_on_where_it_was(normals, trained):
    more = train(normals, QUICK.model_copy(update={"steps": 10}), start_from=trained.student.state_dict())
    assert np.mean(more.history) < 0.5 * np.mean(trained.history[:10])


def test_warm_start_from_another_network(normals, trained):
    narrower = QUICK.model_copy(update={"detector_options": {"width": 0.125}})
    with pytest.raises(ModelError, match="another network") as caught:
        train(normals, narrower, start_from=trained.student.state_dict())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images",
    [
        np.full((1, 64, 64, 3), 90, np.uint8),
        np.zeros((6, 64, 64, 3), np.uint8),
        [np.full((30, 50, 3), 10, np.uint8), np.full((90, 20, 3), 200, np.uint8)],
    ],
    ids=["one image", "all black", "mixed sizes"],
)
def test_degenerate_sets_train(images):
    student = train(images, QUICK.model_copy(update={"steps": 4}))
    assert all(np.isfinite(student.history))
    assert np.isfinite(student.calibration.threshold)
    assert len(student.calibration.scores) >= 1


def test_no_images_are_refused():
    with pytest.raises(TrainingDataError, match="no images"):
        train([], QUICK)


def test_divergence_is_an_error(normals):
    wild = QUICK.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30})
    with pytest.raises(ModelError, match=r"diverged at step 10.*lower learning_rate"):
        train(normals, wild)


def test_progress_and_stopping(normals):
    reports = []
    settings = QUICK.model_copy(update={"steps": 25})
    train(normals, settings, progress=lambda *state: reports.append(state))
    assert [(step, steps) for step, steps, _ in reports] == [(10, 25), (20, 25), (25, 25)]
    with pytest.raises(TrainingStoppedError, match="step 10 of 25"):
        train(normals, settings, should_stop=lambda: True)


def test_best_checkpoint_is_the_one_kept(normals, monkeypatch):
    settings = QUICK.model_copy(update={"schedule": "constant", "steps": 7})
    seventh = train(normals, settings)
    # Held-out losses of 20 steps, one checkpoint a step, with the lowest at the seventh.
    losses = iter([9.0] * 6 + [1.0] + [2.0] * 13)
    monkeypatch.setattr("models.fitting.Fit.held_out_loss", lambda fit: next(losses))
    best = train(normals, settings.model_copy(update={"keep": "best", "steps": 20}))
    assert len(best.history) == 20
    for key, value in best.student.state_dict().items():
        assert torch.equal(value, seventh.student.state_dict()[key]), key


def test_holdout_is_stable_under_growth(normals):
    trained_on, held_out = split_holdout(normals[:30], 0.2)
    assert sorted([*trained_on, *held_out]) == list(range(30))
    more_trained_on, more_held_out = split_holdout(normals, 0.2)
    assert set(trained_on) <= set(more_trained_on)
    assert set(held_out) <= set(more_held_out)


def test_holdout_of_small_and_repeated_sets():
    one = np.zeros((1, 8, 8, 3), np.uint8)
    assert [side.tolist() for side in split_holdout(one, 0.2)] == [[0], [0]]
    copies = np.zeros((5, 8, 8, 3), np.uint8)
    assert [len(side) for side in split_holdout(copies, 0.2)] == [5, 5]
    for seed in range(20):
        two = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), np.uint8)
        for share in (0.01, 0.99):
            assert [len(side) for side in split_holdout(two, share)] == [1, 1]


def test_version_round_trip_judges_alike(trained, labelled, tmp_path):
    registry = Registry(tmp_path)
    images = [TrainingImage(id=f"{index}.png", sha256="00" * 32) for index in range(40)]
    card = registry.publish(draft_card(trained, "weave", images, ["here"], None, "tester"), trained.student)
    loaded, state = registry.load_student("weave", card.version)
    teacher = load_teacher(loaded.teacher.name)
    detector, student = restore(loaded, state, teacher)
    assert detector == trained.detector
    for key, value in student.state_dict().items():
        assert torch.equal(value, trained.student.state_dict()[key])
    assert loaded.training.settings == QUICK
    other = loaded.model_copy(update={"teacher": loaded.teacher.model_copy(update={"weights_sha256": "0" * 64})})
    with pytest.raises(VersionError, match="other weights"):
        restore(other, state, teacher)
    for revision, remedy in ((0, "train the product again"), (99, "upgrade")):
        record = loaded.detector.model_copy(update={"revision": revision, "options": {"unknown": 1}})
        with pytest.raises(VersionError, match=f"{card.version} is of revision {revision} of .* {remedy}"):
            restore(loaded.model_copy(update={"detector": record}), state, teacher)
    state.pop(next(name for name in state if name.endswith("conv1.weight")))
    with pytest.raises(VersionError, match="does not fit"):
        restore(loaded, state, teacher)


@pytest.mark.parametrize("name", RECIPES)
def test_a_products_settings_take_a_recipe_and_keep_what_is_the_products(name):
    own = TrainingSettings(detector="efficientad", false_reject_rate=0.2, threads=1, seed=5, device="cpu")
    changed = own.changed(recipe_changes(name))
    kept = {"weights", "device", "threads", "cache_bytes", "false_reject_rate", "seed"}
    assert changed.model_dump(exclude=kept) == recipe(name).model_dump(exclude=kept)
    assert changed.model_dump(include=kept) == own.model_dump(include=kept)
    make_detector(changed.detector, changed.detector_options)


def test_recipes():
    assert recipe("fast") is RECIPES["fast"]
    paper = recipe("paper")
    assert (paper.teacher, paper.optimizer, paper.learning_rate) == ("resnet18", "sgd", 0.4)
    with pytest.raises(ModelError, match=r"slow.*Known: accurate, fast, paper"):
        recipe("slow")


def test_solar_cells():
    if not ELPV.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{ELPV} is missing")
        pytest.skip(f"{ELPV} is not on this machine")
    normals, _ = read_training_images(list_images(ELPV / "train/good")[::4], 128)
    kinds = [list_images(ELPV / "test" / kind)[::3] for kind in ("good", "defect")]
    images, _ = read_training_images([*kinds[0], *kinds[1]], 128)
    labels = np.repeat([False, True], [len(kinds[0]), len(kinds[1])])
    _, scores, _ = judge(train(normals, RECIPES["fast"]), images)
    assert image_auroc(scores, labels) >= 0.88
