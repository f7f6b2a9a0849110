"""Labelled inspection sets in MVTec AD's folder layout.

`train/good/*`, `test/good/*`, `test/<defect>/*` and, where there are masks,
`ground_truth/<defect>/<stem>_mask.png`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from models.errors import TrainingDataError
from models.images import list_images, read_image


@dataclass(frozen=True)
class LabelledImage:
    """One test image.

    Attributes:
        path: The file.
        kind: 'good' or the defect's name.
        mask: Ground truth file, None where there is none.
    """

    path: Path
    kind: str
    mask: Path | None

    @property
    def is_defect(self) -> bool:
        """Whether a detector should reject it."""
        return self.kind != "good"


@dataclass(frozen=True)
class InspectionSet:
    """A category: normal images to train on, labelled images to test on.

    Attributes:
        name: The folder's.
        train: Normal images.
        test: Normal and defective images.
    """

    name: str
    train: list[Path]
    test: list[LabelledImage]

    @property
    def has_masks(self) -> bool:
        """Whether every defective test image has its ground truth."""
        defects = [image for image in self.test if image.is_defect]
        return bool(defects) and all(image.mask is not None for image in defects)


def find_sets(folder: str | Path) -> list[InspectionSet]:
    """Read a set's folder, or a folder of such folders.

    Raises:
        TrainingDataError: No set is there, or one is incomplete.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingDataError(f"{folder}: no such folder")
    if (folder / "train").is_dir():
        return [read_set(folder)]
    found = [read_set(path) for path in sorted(folder.iterdir()) if (path / "train").is_dir()]
    if not found:
        raise TrainingDataError(f"{folder}: expected train/good and test/..., or folders that have them")
    return found


def read_set(folder: Path) -> InspectionSet:
    """List one set's images.

    Raises:
        TrainingDataError: A folder is missing or empty.
    """
    train = list_images(folder / "train" / "good")
    if not (folder / "test").is_dir():
        raise TrainingDataError(f"{folder / 'test'}: no such folder")
    test = [
        LabelledImage(path, kind.name, _mask_of(folder, kind.name, path.stem))
        for kind in sorted((folder / "test").iterdir())
        if kind.is_dir()
        for path in list_images(kind)
    ]
    if not test:
        raise TrainingDataError(f"{folder / 'test'}: expected a folder for each defect, and 'good'")
    return InspectionSet(folder.resolve().name, train, test)


def read_mask(image: LabelledImage, size: int) -> np.ndarray:
    """Return an image's ground truth as (size, size) bool, True where defective; all False without a mask.

    Raises:
        TrainingDataError: The mask cannot be read.
    """
    if image.mask is None:
        return np.zeros((size, size), bool)
    grey = read_image(image.mask)[:, :, 0]
    return cv2.resize((grey > 0).astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) > 0


def _mask_of(folder: Path, kind: str, stem: str) -> Path | None:
    path = folder / "ground_truth" / kind / f"{stem}_mask.png"
    return path if kind != "good" and path.is_file() else None
