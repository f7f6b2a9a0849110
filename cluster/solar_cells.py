"""Real solar cells for the demo: the ELPV set, from the package `elpv-dataset` (CC BY-NC-SA 4.0).

Source: Buerhop et al., A benchmark for visual identification of defective solar cells in electroluminescence
imagery, EU PVSEC 2018.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import ProctorError

LICENCE = "ELPV solar cells, CC BY-NC-SA 4.0: for trying and research, not for commercial use"
_SEED = 7


@dataclass(frozen=True)
class Cell:
    """One solar cell.

    Attributes:
        name: its number in the set, as a file name without suffix.
        is_defect: labelled as surely defective; else as surely functional.
        is_reviewed: a reviewer may approve it; the others only measure, so no image is learned and measured.
        path: its PNG file.
    """

    name: str
    is_defect: bool
    is_reviewed: bool
    path: Path


@dataclass(frozen=True)
class CellSets:
    """What the demo trains on and what its cameras show.

    Attributes:
        train_folder: normal cells of the first training.
        line: cells before the cameras: normal ones for review, normal and defective ones for measuring.
    """

    train_folder: Path
    line: list[Cell]


def write_cells(folder: Path, train: int, line: int) -> CellSets:
    """Draw disjoint sets of monocrystalline cells and write them as PNG files.

    Args:
        folder: receives `train/` and `line/`.
        train: normal cells to train on.
        line: cells before the cameras, a third each reviewed normal, measured normal and defective.

    Raises:
        ProctorError: the package is not installed, or there are not as many cells.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise ProctorError("the demo needs its images: pip install 'proctor[demo]'") from None
    images, probabilities, kinds = load_dataset()
    draw = np.random.default_rng(_SEED)
    normal = draw.permutation(np.flatnonzero((kinds == "mono") & (probabilities == 0)))
    defect = draw.permutation(np.flatnonzero((kinds == "mono") & (probabilities == 1)))
    third = line // 3
    if train + 2 * third > len(normal) or third > len(defect):
        most = 3 * min((len(normal) - train) // 2, len(defect))
        raise ProctorError(f"the set has not as many cells: at most {most} before the cameras")
    for name in ("train", "line"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in normal[:train]:
        _write(images[index], folder / "train" / f"{index:04d}.png")
    reviewed = normal[train : train + third]
    chosen = np.concatenate([reviewed, normal[train + third : train + 2 * third], defect[:third]])
    cells = []
    for index in draw.permutation(chosen):
        path = folder / "line" / f"{index:04d}.png"
        _write(images[index], path)
        cells.append(Cell(path.stem, bool(probabilities[index] == 1), bool(index in reviewed), path))
    return CellSets(folder / "train", cells)


def _write(image: np.ndarray, path: Path) -> None:
    import cv2

    if not cv2.imwrite(str(path), image):
        raise ProctorError(f"cannot write {path}: is the disk full?")
