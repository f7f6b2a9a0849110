"""The exhibits of a gallery: misses, false rejects and hits of one student, chosen and drawn."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cluster.contact_sheet import overlay
from models.datasets import LabelledImage, read_mask
from models.evaluation import Judged
from models.images import read_image

MOST_EXHIBITS = 24
_SIDE = 320
_MARGIN = 9  # of the outline, so that it does not hide a fine crack
_OUTLINE, _OUTLINE_EDGE = (80, 230, 255), (10, 20, 30)


@dataclass(frozen=True)
class Exhibit:
    """One test image and what the student made of it.

    Attributes:
        name: the file's.
        kind: 'good' or the defect's name.
        score: of the image.
        ratio: score over threshold, above 1 for a reject.
        picture: the image, with the outline of the ground truth where there is one; relative to the page.
        heat: the anomaly map over the image; likewise.
        size: width and height of both, pixels.
        outlined: whether there is an outline.
    """

    name: str
    kind: str
    score: float
    ratio: float
    picture: str
    heat: str
    size: tuple[int, int]
    outlined: bool

    @property
    def alt(self) -> str:
        """The picture in words."""
        outline = ", the defect outlined" if self.outlined else ""
        return f"{self.kind}, {self.name}: score {self.ratio:.2f} times the threshold{outline}"

    @property
    def heat_alt(self) -> str:
        """The heat map in words."""
        return f"Anomaly map over {self.kind}, {self.name}"


@dataclass(frozen=True)
class Group:
    """Exhibits of one outcome, the most telling first.

    Attributes:
        slug: short name, for files.
        title: heading.
        order: what comes first.
        exhibits: at most `MOST_EXHIBITS`.
        left_out: how many more there are.
    """

    slug: str
    title: str
    order: str
    exhibits: list[Exhibit]
    left_out: int


def draw_exhibits(judged: Judged, out: Path, folder: str) -> list[Group]:
    """Draw the exhibits of one student.

    Args:
        judged: the set's images, maps and scores.
        out: the page's folder.
        folder: for the pictures, relative to it; exists.

    Returns:
        The groups, empty ones too.
    """
    defects = np.array([image.is_defect for image in judged.tested.test])
    rising = np.argsort(judged.scores, kind="stable")
    falling = rising[::-1]
    wanted = (
        ("miss", "Missed defects", "the lowest score first", rising[(defects & ~judged.fails)[rising]]),
        ("false-reject", "False rejects", "the highest score first", falling[(~defects & judged.fails)[falling]]),
        ("hit", "Detected defects", "the clearest first", falling[(defects & judged.fails)[falling]]),
    )
    groups = []
    for slug, title, order, chosen in wanted:
        shown = [int(index) for index in chosen[:MOST_EXHIBITS]]
        exhibits = [_draw(judged, index, out, f"{folder}/{slug}-{place:02}") for place, index in enumerate(shown, 1)]
        groups.append(Group(slug, title, order, exhibits, len(chosen) - len(shown)))
    return groups


def _draw(judged: Judged, index: int, out: Path, stem: str) -> Exhibit:
    image, threshold = judged.tested.test[index], judged.result.threshold
    picture = _enlarged(read_image(image.path))
    heat = overlay(picture, judged.maps[index], threshold)
    outline = _outline(image, picture.shape[:2])
    for drawn, name in ((picture, f"{stem}.jpg"), (heat, f"{stem}-map.jpg")):
        cv2.drawContours(drawn, outline, -1, _OUTLINE_EDGE, 4, cv2.LINE_AA)
        cv2.drawContours(drawn, outline, -1, _OUTLINE, 2, cv2.LINE_AA)
        Image.fromarray(drawn).save(out / name, quality=88)
    score = float(judged.scores[index])
    return Exhibit(
        name=image.path.name,
        kind=image.kind,
        score=score,
        ratio=score / threshold if threshold else float("inf"),
        picture=f"{stem}.jpg",
        heat=f"{stem}-map.jpg",
        size=(picture.shape[1], picture.shape[0]),
        outlined=bool(outline),
    )


def _enlarged(image: np.ndarray) -> np.ndarray:
    """The image with its longer side as long as a gallery shows it, in its own aspect ratio."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def _outline(image: LabelledImage, shape: tuple[int, int]) -> list[np.ndarray]:
    """Contours a little outside the ground truth, for a picture of that (height, width); none without a mask."""
    if image.mask is None:
        return []
    mask = read_mask(image).astype(np.float32)
    # averaging and any share above zero: a scratch one pixel wide must not vanish where the picture is smaller
    shrunk = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_AREA) > 0
    around = cv2.dilate(shrunk.astype(np.uint8), np.ones((_MARGIN, _MARGIN), np.uint8))
    contours, _ = cv2.findContours(around, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return list(contours)
