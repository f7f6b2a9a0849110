"""Poor sets of images: each trains to finite scores and a finite threshold, or is refused in one line."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.calibration import is_fail
from models.detectors import DETECTORS
from models.errors import TrainingDataError
from models.evaluation import evaluate
from models.images import list_images, read_training_images
from models.judging import judge
from models.settings import TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import train

SIZE = 64
# What makes a detector small enough for a test; those that are not named here are taken as they are.
OPTIONS = {"stfpm": {"width": 0.125, "hardest": 0.1}}


def quick(detector: str = "stfpm") -> TrainingSettings:
    options = OPTIONS.get(detector, {})
    return TrainingSettings(
        detector=detector, detector_options=options, steps=6, batch_size=4, input_size=SIZE, device="cpu", threads=1
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("efficientnet_lite0")


def texture(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Stripes with noise, (height, width, 3) uint8, another image for every seed."""
    generator = np.random.default_rng(seed)
    stripes = 120 + 60 * np.sin(np.arange(width) / 3 + generator.uniform(0, 6))
    return np.clip(stripes[:, None] + generator.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def plain(level: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def read_back(folder: Path, pictures: Sequence[Image.Image]) -> np.ndarray:
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    return read_training_images(list_images(folder), SIZE)[0]


def grey(folder: Path) -> np.ndarray:
    return read_back(folder, [Image.fromarray(texture(seed)[:, :, 0].copy()) for seed in range(6)])


def grey_16_bit(folder: Path) -> np.ndarray:
    return read_back(folder, [Image.fromarray(texture(seed)[:, :, 0].astype(np.uint16) * 257) for seed in range(6)])


def grey_12_in_16_bit(folder: Path) -> np.ndarray:
    return read_back(folder, [Image.fromarray(texture(seed)[:, :, 0].astype(np.uint16) * 16) for seed in range(6)])


POOR_SETS: dict[str, Callable[[Path], Sequence[np.ndarray]]] = {
    "one image": lambda folder: [texture(0)],
    "two images": lambda folder: [texture(0), texture(1)],
    "ten images": lambda folder: [texture(seed) for seed in range(10)],
    "one image six times": lambda folder: [texture(0)] * 6,
    "one image six times and another": lambda folder: [*[texture(0)] * 6, texture(1)],
    "all black": lambda folder: [plain(0)] * 6,
    "all white": lambda folder: [plain(255)] * 6,
    "black and white": lambda folder: [plain(0), plain(255)] * 3,
    "mixed sizes": lambda folder: [texture(0, 40, 200), texture(1, 300, 30), texture(2, 64, 64), texture(3, 1, 1)],
    "grey": grey,
    "16-bit grey": grey_16_bit,
    "12-bit grey in 16 bits": grey_12_in_16_bit,
}

PROBES = np.stack(
    [
        texture(99),
        plain(0),
        plain(255),
        plain(128),
        np.random.default_rng(5).integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        np.where(np.eye(SIZE, dtype=bool)[:, :, None], 255, plain(0)).astype(np.uint8),
    ]
)


@pytest.mark.parametrize("images", POOR_SETS.values(), ids=POOR_SETS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_poor_sets_train_to_finite_scores(detector, images, teacher, tmp_path):
    images = images(tmp_path)
    trained = train(images, quick(detector), teacher=teacher)
    assert np.isfinite(trained.history).all()
    assert all(torch.isfinite(value).all() for value in trained.student.state_dict().values())
    assert np.isfinite(trained.calibration.threshold)
    assert len(trained.calibration.scores) >= 1
    maps, scores, _ = judge(trained, PROBES)
    assert np.isfinite(maps).all()
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("detector", DETECTORS)
def test_what_was_learnt_passes_even_where_it_shows_nothing(detector, level, teacher):
    trained = train([plain(level)] * 6, quick(detector), teacher=teacher)
    # In a batch of another size than in calibration: the last digits may differ.
    _, scores, _ = judge(trained, np.stack([plain(level)] * 3))
    assert not any(is_fail(float(score), trained.calibration.threshold) for score in scores)


@pytest.mark.parametrize("detector", DETECTORS)
def test_no_image_is_refused(detector, teacher):
    with pytest.raises(TrainingDataError, match="no images"):
        train([], quick(detector), teacher=teacher)


# --- labelled sets


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations here take no time to measure how fast they are."""
    monkeypatch.setattr("models.evaluation.speed", lambda *_: 1.0)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four normal images to train on, two to test on, two defects without masks."""
    for seed in range(4):
        write(tmp_path / f"set/train/good/{seed}.png", texture(seed))
    for seed in range(2):
        write(tmp_path / f"set/test/good/{seed}.png", texture(10 + seed))
        image = texture(20 + seed)
        image[20:30, 20:30] = 255
        write(tmp_path / f"set/test/spot/{seed}.png", image)
    return tmp_path / "set"


def spot(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Where the defects are, as a mask of any size."""
    mask = np.zeros((height, width), np.uint8)
    mask[20 * height // SIZE : 30 * height // SIZE, 20 * width // SIZE : 30 * width // SIZE] = 255
    return mask


def write_masks(labelled: Path, *masks: np.ndarray) -> None:
    for index, mask in enumerate(masks):
        write(labelled / f"ground_truth/spot/{index}_mask.png", mask)


@pytest.mark.parametrize("masks", [0, 1], ids=["no mask", "one of two masks"])
def test_without_all_masks_there_are_no_pixel_figures(labelled, masks):
    write_masks(labelled, *[spot()] * masks)
    (result,) = evaluate(labelled, quick()).results
    assert result.pixel_auroc is None
    assert 0 <= result.image_auroc <= 1
    assert np.isfinite(result.threshold)


def test_masks_of_another_size_are_measured_at_it(labelled):
    write_masks(labelled, spot(), spot(200, 200))
    (result,) = evaluate(labelled, quick()).results
    assert 0 <= result.pixel_auroc <= 1


def test_test_images_of_mixed_sizes_and_modes(labelled):
    write(labelled / "test/good/wide.png", texture(30, 40, 200))
    write(labelled / "test/good/grey.png", texture(31)[:, :, 0].copy())
    write(labelled / "test/spot/deep.png", texture(32, 90, 30)[:, :, 0].astype(np.uint16) * 257)
    write_masks(labelled, spot(), spot())
    write(labelled / "ground_truth/spot/deep_mask.png", spot(180, 60))
    (result,) = evaluate(labelled, quick()).results
    assert (result.test_good, result.test_defects) == (4, 3)
    assert 0 <= result.pixel_auroc <= 1


@pytest.mark.parametrize("marked", [True, False], ids=["beside one that marks", "of all defects"])
def test_a_black_mask_marks_nothing(labelled, marked):
    black = np.zeros((SIZE, SIZE), np.uint8)
    write_masks(labelled, spot() if marked else black, black)
    (result,) = evaluate(labelled, quick()).results
    # Where none marks a pixel there is none to find.
    assert (result.pixel_auroc is not None) == marked


def test_another_images_mask_is_refused_before_training(labelled, monkeypatch):
    write_masks(labelled, spot(), spot(SIZE, SIZE // 2))
    monkeypatch.setattr("models.evaluation.train", lambda *_, **__: pytest.fail("trained before looking"))
    refuses(labelled, r"1_mask.png: expected the shape of 1.png, 64 x 64, found 32 x 64")


def test_only_normal_test_images_are_refused(labelled):
    for path in (labelled / "test/spot").iterdir():
        path.unlink()
    (labelled / "test/spot").rmdir()
    refuses(labelled, "set: its test images are all of one kind")


def test_only_defective_test_images_are_refused(labelled):
    for path in (labelled / "test/good").iterdir():
        path.unlink()
    (labelled / "test/good").rmdir()
    refuses(labelled, "set: its test images are all of one kind")


def test_good_and_bad_folders_are_measured(labelled, tmp_path):
    root = tmp_path / "plain"
    root.mkdir()
    (labelled / "train/good").rename(root / "OK")
    (labelled / "test/spot").rename(root / "NG")
    write(root / "masks/0.png", spot())
    write(root / "masks/1.png", spot())
    (result,) = evaluate(root, quick()).results
    assert result.train_images + result.test_good == 4
    assert result.test_defects == 2
    assert 0 <= result.pixel_auroc <= 1


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(TrainingDataError, match=message) as caught:
        evaluate(folder, quick())
    assert "\n" not in str(caught.value)
