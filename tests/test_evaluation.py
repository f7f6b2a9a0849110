"""Measuring on labelled sets, through the command that a person types."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from models.errors import TrainingDataError
from models.evaluation import evaluate
from models.metrics import image_auroc
from models.settings import TrainingSettings

QUICK = TrainingSettings(input_size=64, steps=60, device="cpu")


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


def write_set(root, train, test_good, test_bad):
    """A set in MVTec AD's layout from so many normal and defective images."""
    generator = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/patch", "ground_truth/patch"):
        (root / folder).mkdir(parents=True)
    for index in range(train):
        Image.fromarray(texture(generator)).save(root / f"train/good/{index:02}.png")
    for index in range(test_good):
        Image.fromarray(texture(generator)).save(root / f"test/good/{index:02}.png")
    for index in range(test_bad):
        image, mask = defective(generator)
        Image.fromarray(image).save(root / f"test/patch/{index:02}.png")
        Image.fromarray(mask).save(root / f"ground_truth/patch/{index:02}_mask.png")


def test_evaluation_of_a_folder(tmp_path):
    write_set(tmp_path / "sets/weave", 40, 20, 20)
    seen = set()
    result = evaluate(
        tmp_path / "sets",
        QUICK,
        out_dir=tmp_path / "out",
        progress=lambda name, step, steps, loss: seen.add((name, steps)),
        seeds=(0, 1),
    )
    assert seen == {("weave", QUICK.steps)}
    assert [(each.name, each.seed) for each in result.results] == [("weave", 0), ("weave", 1)]
    for each in result.results:
        assert (each.train_images, each.test_good, each.test_defects) == (40, 20, 20)
        assert each.image_auroc >= 0.95
        assert each.pixel_auroc >= 0.9
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == result.model_dump(mode="json")
    with (tmp_path / "out/weave-seed1.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = np.array([float(row["score"]) for row in rows])
    assert image_auroc(scores, np.array([row["kind"] == "patch" for row in rows])) == result.results[1].image_auroc


def test_evaluation_without_defects(tmp_path):
    write_set(tmp_path / "weave", 2, 2, 0)
    (tmp_path / "weave/test/patch").rmdir()
    with pytest.raises(TrainingDataError, match="good and defective"):
        evaluate(tmp_path, QUICK)
