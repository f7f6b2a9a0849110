"""Labelled inspection sets, read from the three layouts they commonly come in.

MVTec AD:  train/good/*, test/good/*, test/DEFECT/*, ground_truth/DEFECT/STEM_mask.png (or STEM.png)
VisA:      Data/Images/Normal/*, Data/Images/Anomaly/*, Data/Masks/Anomaly/STEM.png, image_anno.csv, and in the folder
           above the sets split_csv/1cls.csv; without that file 80 % of the normal images are trained on
good/bad:  good/*, bad/*, masks/STEM.png (or STEM_mask.png); 70 % of the good images are trained on

Where a layout names no split, an image's side follows from its file name (`models.holdout.split_by_name`). Masks may
be missing; a set's pixel figures make sense only where every defect has one (`InspectionSet.has_masks`).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from models.errors import TrainingDataError
from models.holdout import split_by_name
from models.images import image_size, list_images, read_nonzero

GOOD = "good"
# Folders' names in lower case.
NORMAL_NAMES = (GOOD, "ok", "normal")
DEFECT_NAMES = ("bad", "ng", "defect", "defects", "anomaly")
MASK_NAMES = ("masks",)

VISA_TEST_SHARE = 0.2
PLAIN_TEST_SHARE = 0.3
# A mask's aspect ratio may differ from its image's by rounding.
ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class LabelledImage:
    """One test image.

    Attributes:
        path: The file.
        kind: 'good' or the defect's name.
        mask: Ground truth file; None for a good image, and for a defect of unknown place.
    """

    path: Path
    kind: str
    mask: Path | None

    @property
    def is_defect(self) -> bool:
        """Whether a detector should reject it."""
        return self.kind != GOOD


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
        """Whether there are defects and each has its mask: pixels of one without would count as normal."""
        return any(image.is_defect for image in self.test) and not self.without_mask

    @property
    def without_mask(self) -> list[LabelledImage]:
        """The defective test images that lack a mask."""
        return [image for image in self.test if image.is_defect and image.mask is None]


def find_sets(folder: str | Path) -> list[InspectionSet]:
    """Read a set's folder, or a folder of such folders, which may differ in layout; other folders are passed over.

    Only names are looked at; no image is read.

    Raises:
        TrainingDataError: No set is there, or one is incomplete.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise TrainingDataError(f"{folder}: {'is a file, not a folder' if folder.is_file() else 'no such folder'}")
    try:
        return _read_sets(folder)
    except OSError as error:
        raise TrainingDataError(f"{error.filename or folder}: {error.strerror or error}") from None


def read_mask(image: LabelledImage, size: int | None = None) -> np.ndarray:
    """Return where an image is defective, True where it is; all False for a good image.

    A defect's mask may be all black, as a few of published sets are. It then marks nothing, which is how those sets'
    figures are computed: no region to find, and whatever is found in the image is found wrongly.

    Args:
        image: Good, or a defect with a mask.
        size: Side of the result in pixels, by the nearest pixel, so that thin defects may vanish; None keeps
            the mask's own height and width (for a good image, the image's).

    Returns:
        (size, size) or (H, W) bool.

    Raises:
        TrainingDataError: The defect has no mask, or one that cannot be read or differs from the image in aspect
            ratio by more than 1 %, as another image's would.
    """
    if not image.is_defect:
        return np.zeros(image_size(image.path) if size is None else (size, size), bool)
    if image.mask is None:
        raise TrainingDataError(f"{image.path}: this defect has no mask; add one, or do without pixel figures")
    mask = read_nonzero(image.mask)
    (height, width), (image_height, image_width) = mask.shape, image_size(image.path)
    if abs(width * image_height - height * image_width) > ASPECT_TOLERANCE * height * image_width:
        raise TrainingDataError(
            f"{image.mask}: expected the shape of {image.path.name}, {image_width} x {image_height}, found "
            f"{width} x {height}; is it another image's mask?"
        )
    if size is None:
        return mask
    return cv2.resize(mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) > 0


def _read_sets(folder: Path) -> list[InspectionSet]:
    reader = _reader_of(folder)
    if reader is not None:
        return [reader(folder)]
    inner = [(path, _reader_of(path)) for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [reader(path) for path, reader in inner if reader is not None]
    if not found:
        raise TrainingDataError(
            f"{folder}: expected train/good and test/DEFECT (MVTec AD), Data/Images/Normal and Anomaly (VisA) or good "
            f"and bad, here or in its folders, found {_contents(folder)}; sort the images into one of these"
        )
    return found


def _reader_of(folder: Path) -> Callable[[Path], InspectionSet] | None:
    """Return what reads the layout that the folder begins to have, None where it has none."""
    if (folder / "train").is_dir():
        return _read_mvtec
    if (folder / "Data" / "Images").is_dir():
        return _read_visa
    if _find(folder, NORMAL_NAMES) or _find(folder, DEFECT_NAMES):
        return _read_plain
    return None


# --- MVTec AD


def _read_mvtec(folder: Path) -> InspectionSet:
    train = list_images(_need(folder / "train", NORMAL_NAMES))
    if not (folder / "test").is_dir():
        raise TrainingDataError(
            f"{folder / 'test'}: no such folder; expected test/good and test/DEFECT beside train, "
            f"found {_contents(folder)}"
        )
    test = []
    for inner in filter(Path.is_dir, sorted((folder / "test").iterdir())):
        kind = GOOD if inner.name.lower() in NORMAL_NAMES else inner.name
        masks = None if kind == GOOD else folder / "ground_truth" / kind
        test += [LabelledImage(path, kind, _mask_of(masks, path.stem)) for path in list_images(inner)]
    if not test:
        raise TrainingDataError(
            f"{folder / 'test'}: expected a folder for each defect, and 'good', found {_contents(folder / 'test')}"
        )
    return InspectionSet(folder.name, train, test)


# --- VisA


def _read_visa(folder: Path) -> InspectionSet:
    split = folder.parent / "split_csv" / "1cls.csv"
    if split.is_file():
        return _read_visa_split(folder, split)
    images = folder / "Data" / "Images"
    train, held = _split(_need(images, ("normal",)), VISA_TEST_SHARE)
    defects = list_images(_need(images, ("anomaly",)))
    kinds = _visa_kinds(folder)
    masks = folder / "Data" / "Masks" / "Anomaly"
    test = [LabelledImage(path, GOOD, None) for path in held]
    test += [LabelledImage(path, kinds.get(path.name, "anomaly"), _mask_of(masks, path.stem)) for path in defects]
    return InspectionSet(folder.name, train, test)


def _read_visa_split(folder: Path, split: Path) -> InspectionSet:
    """Read the official split: of the paths in it, `object` names the set and the others are from the root."""
    root, kinds = folder.parent, _visa_kinds(folder)
    train: list[Path] = []
    test: list[LabelledImage] = []
    objects = set()
    for row in _rows(split, ("object", "split", "label", "image", "mask")):
        objects.add(row["object"])
        if row["object"] != folder.name:
            continue
        is_normal = row["label"] == "normal"
        if row["split"] != "test" and not (row["split"] == "train" and is_normal):
            raise TrainingDataError(
                f"{split}: expected split 'train' of label 'normal' or split 'test', found '{row['split']}' of "
                f"'{row['label']}' for {row['image']}; use VisA's own 1cls.csv"
            )
        path, mask = root / row["image"], root / row["mask"] if row["mask"] and not is_normal else None
        missing = [file for file in (path, mask) if file is not None and not file.is_file()]
        if missing:
            raise TrainingDataError(f"{missing[0]}: no such file, but {split} lists it; unpack all of {folder.name}")
        if row["split"] == "train":
            train.append(path)
        else:
            test.append(LabelledImage(path, GOOD if is_normal else kinds.get(path.name, "anomaly"), mask))
    if not train or not test:
        raise TrainingDataError(
            f"{split}: expected images of '{folder.name}' to train on and to test, found those of "
            f"{', '.join(sorted(objects)) or 'nothing'}; give the folder its published name or move the file away"
        )
    return InspectionSet(folder.name, sorted(train), sorted(test, key=lambda image: (image.is_defect, image.path)))


def _visa_kinds(folder: Path) -> dict[str, str]:
    """Return the names of the defects by the defective images' file names, as far as image_anno.csv knows them."""
    annotations = folder / "image_anno.csv"
    if not annotations.is_file():
        return {}
    kinds = {}
    for row in _rows(annotations, ("image", "label")):
        # An image of several defects lists them in any order.
        names = sorted({name.strip() for name in row["label"].split(",")} - {""})
        if names and names[0] not in NORMAL_NAMES:
            kinds[Path(row["image"]).name] = ", ".join(names)
    return kinds


def _rows(path: Path, columns: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file with a header; what a short row lacks is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            found = reader.fieldnames or []
            if not set(columns) <= set(found):
                raise TrainingDataError(f"{path}: expected the columns {', '.join(columns)}, found {', '.join(found)}")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingDataError(f"{path}: unreadable ({error})") from None


# --- good/bad


def _read_plain(folder: Path) -> InspectionSet:
    train, held = _split(_need(folder, NORMAL_NAMES), PLAIN_TEST_SHARE)
    bad = _need(folder, DEFECT_NAMES)
    masks = _find(folder, MASK_NAMES)
    test = [LabelledImage(path, GOOD, None) for path in held]
    test += [LabelledImage(path, bad.name.lower(), _mask_of(masks, path.stem)) for path in list_images(bad)]
    return InspectionSet(folder.name, train, test)


# --- what the layouts share


def _split(folder: Path, share: float) -> tuple[list[Path], list[Path]]:
    """Return a folder's images to train on and to test, neither empty."""
    train, held = split_by_name(list_images(folder), share)
    if not held:
        raise TrainingDataError(
            f"{folder}: expected an image to train on and one to test at least, found one; add more"
        )
    return train, held


def _mask_of(folder: Path | None, stem: str) -> Path | None:
    """Return an image's mask in a folder of masks, None where there is none."""
    if folder is None:
        return None
    candidates = (folder / f"{stem}_mask.png", folder / f"{stem}.png")
    return next((path for path in candidates if path.is_file()), None)


def _find(folder: Path, names: Collection[str]) -> Path | None:
    """Return the folder in `folder` that has one of the names, in whatever case; None where there is none.

    Raises:
        TrainingDataError: There are several, so it is unclear which is meant.
    """
    found = sorted(path for path in folder.iterdir() if path.name.lower() in names and path.is_dir())
    if len(found) > 1:
        both = ", ".join(path.name for path in found)
        raise TrainingDataError(f"{folder}: expected one folder of {', '.join(names)}, found {both}; join them")
    return found[0] if found else None


def _need(folder: Path, names: Collection[str]) -> Path:
    """Return what `_find` does, or raise TrainingDataError."""
    found = _find(folder, names)
    if found is None:
        wanted = " or ".join(names)
        raise TrainingDataError(f"{folder}: expected a folder {wanted}, found {_contents(folder)}; add or rename it")
    return found


def _contents(folder: Path, limit: int = 6) -> str:
    """Say in a few words what a folder holds."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
