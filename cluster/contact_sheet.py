"""The contact sheet: image, anomaly map over it and verdict of some frames, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workers.evidence import dequantised

_TILE = 190
_GAP, _MARGIN, _HEADER, _CAPTION = 18, 30, 86, 46
_BACKGROUND, _INK, _DIM = (17, 20, 26), (235, 238, 243), (139, 148, 161)
_COLOURS = {"pass": (52, 168, 110), "fail": (222, 70, 70), "unknown": (214, 160, 50)}


@dataclass(frozen=True)
class Exhibit:
    """One frame on the sheet.

    Attributes:
        row: its result, see `workers.results.SCHEMA`, with map and image.
        remark: what a person knows of it, a few words.
    """

    row: dict
    remark: str


def draw_sheet(exhibits: Sequence[Exhibit], title: str, subtitle: str, path: Path, columns: int = 3) -> None:
    """Draw the sheet and write it as PNG.

    Args:
        exhibits: frames that have map and image; row by row.
        title: first line.
        subtitle: second line.
        path: where to.
        columns: exhibits in a row.
    """
    rows = -(-len(exhibits) // columns)
    cell_width, cell_height = 2 * _TILE + _GAP, _TILE + _CAPTION + _GAP
    width = 2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP
    sheet = Image.new("RGB", (width, _HEADER + rows * cell_height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 20), title, _INK, _font(26))
    draw.text((_MARGIN, 54), subtitle, _DIM, _font(15))
    for index, exhibit in enumerate(exhibits):
        left = _MARGIN + (index % columns) * (cell_width + _GAP)
        _draw_exhibit(sheet, draw, exhibit, left, _HEADER + (index // columns) * cell_height)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_exhibit(sheet: Image.Image, draw: ImageDraw.ImageDraw, exhibit: Exhibit, left: int, top: int) -> None:
    row = exhibit.row
    image = cv2.imdecode(np.frombuffer(row["image_jpeg"], np.uint8), cv2.IMREAD_COLOR_RGB)
    image = cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    anomaly_map = dequantised(row["map_u8"], row["map_min"], row["map_max"])
    sheet.paste(Image.fromarray(image), (left, top))
    sheet.paste(Image.fromarray(overlay(image, anomaly_map, row["threshold"])), (left + _TILE + 4, top))
    colour = _COLOURS[row["verdict"]]
    draw.rectangle((left, top + _TILE + 6, left + 58, top + _TILE + 26), colour)
    draw.text((left + 29, top + _TILE + 16), row["verdict"].upper(), _BACKGROUND, _font(13), anchor="mm")
    ratio = row["score"] / row["threshold"] if row["threshold"] else float("inf")
    draw.text((left + 68, top + _TILE + 16), f"{ratio:.2f} x threshold", _INK, _font(14), anchor="lm")
    draw.text((left + 2 * _TILE + 4, top + _TILE + 16), row["camera"], _DIM, _font(13), anchor="rm")
    draw.text((left, top + _TILE + 38), exhibit.remark, _DIM, _font(13), anchor="lm")


def overlay(image: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """The anomaly map over a darkened image: transparent far below the threshold, glowing above it.

    Args:
        image: (H, W, 3) uint8 RGB.
        anomaly_map: (h, w) float32.
        threshold: of the version that made the map.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    enlarged = cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_CUBIC)
    # the square root shows what is below the threshold, too; a strong map is scaled by itself to keep its shape
    top = max(2.0 * threshold, 0.8 * float(anomaly_map.max()), 1e-12)
    level = np.sqrt(np.clip(enlarged / top, 0.0, 1.0))
    heat = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    weight = np.clip(level, 0.15, 0.85)[:, :, None]
    return (image * (1 - weight) * 0.9 + heat * weight).astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
