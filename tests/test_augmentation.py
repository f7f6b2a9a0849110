import numpy as np
import pytest
import torch

from models.augmentation import CameraAugmentation
from models.features import TeacherFeatures
from models.inference import prepare
from models.settings import TrainingSettings
from models.teachers import load_teacher
from models.training import train


def images(count: int = 8, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(60, 190, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def test_light_and_place_vary_and_nothing_else():
    plain = images()
    varied = CameraAugmentation(0)(plain)
    assert varied.shape == plain.shape
    assert varied.dtype == torch.uint8
    for before, after in zip(plain.float(), varied.float(), strict=True):
        assert not torch.equal(before, after)
        assert abs(float(after.mean() - before.mean())) < 10
        best = 0.0
        for y in range(5):
            for x in range(5):
                moved = before[y : y + 60, x : x + 60]
                pair = torch.stack([moved.flatten(), after[2:62, 2:62].flatten()])
                best = max(best, float(torch.corrcoef(pair)[0, 1]))
        # Up to rounding it is the image again, moved by at most two pixels and lit otherwise.
        assert best > 0.99


def test_draws_follow_the_seed():
    first, again, other = (CameraAugmentation(seed)(images()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_step_sees_other_images_and_features_of_just_those():
    teacher = prepare(load_teacher("efficientnet_lite0"), torch.device("cpu"), torch.float32)
    source = TeacherFeatures(teacher, images().numpy(), cache_bytes=2**30, augment=CameraAugmentation(0))
    indices = torch.arange(4)
    (one, features), (other, _) = source.batch(indices), source.batch(indices)
    assert not torch.equal(one, other)
    with torch.inference_mode():
        for own, expected in zip(features, teacher(one), strict=True):
            torch.testing.assert_close(own, expected)


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return images(20).numpy()


QUICK = TrainingSettings(input_size=64, steps=40, detector_options={"width": 0.125}, device="cpu")


def test_an_augmented_training_follows_its_seed(normals):
    settings = QUICK.model_copy(update={"augment": "camera", "steps": 10})
    first, again = train(normals, settings), train(normals, settings)
    assert first.history == again.history
    assert first.history != train(normals, settings.model_copy(update={"augment": "none"})).history


def test_a_plateau_on_held_out_normals_ends_the_training(normals, monkeypatch):
    # Looks come every second step; after the third nothing improves.
    losses = iter([3.0, 2.0, 1.0] + [1.5] * 20)
    monkeypatch.setattr("models.fitting.Fit.held_out_loss", lambda fit: next(losses))
    trained = train(normals, QUICK.model_copy(update={"patience": 4}))
    assert len(trained.history) == 2 * (3 + 4)


def test_a_compiled_step_learns_the_same(normals):
    plain = train(normals, QUICK.model_copy(update={"steps": 10}))
    compiled = train(normals, QUICK.model_copy(update={"steps": 10, "compile": True}))
    assert compiled.history == pytest.approx(plain.history, rel=0.05)
    assert list(compiled.student.state_dict()) == list(plain.student.state_dict())


def test_another_detector_starts_from_its_own_options():
    tuned = TrainingSettings(detector="stfpm", detector_options={"width": 0.25})
    assert tuned.changed({"steps": 7}).detector_options == {"width": 0.25}
    assert tuned.changed({"detector": "stfpm"}).detector_options == {"width": 0.25}
    assert tuned.changed({"detector": "efficientad"}).detector_options == {}
    assert tuned.changed({"detector": "efficientad", "detector_options": {"hard": 0.5}}).detector_options == {
        "hard": 0.5
    }
