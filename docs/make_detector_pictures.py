"""Draws `docs/pictures/*.svg`, the schematics of the page on detectors.

python docs/make_detector_pictures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

FOLDER = Path(__file__).with_name("pictures")
FILLS = {"frozen": "#dfe3e8", "trained": "#cfe2ff", "measured": "#ffe8b8", "plain": "#ffffff", "map": "#ffd6d1"}
LEGEND = {"frozen": "frozen", "trained": "trained", "measured": "measured on normal images", "map": "distances"}
INK = "#24292f"
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A drawn box, in inches from the picture's lower left corner: centre, width, height."""

    x: float
    y: float
    width: float
    height: float

    def side(self, name: str, shift: float = 0.0) -> Point:
        """Return the middle of a side, left, right, top or bottom, moved along it by `shift` inches."""
        half_width, half_height = self.width / 2, self.height / 2
        if name in ("left", "right"):
            return self.x + (half_width if name == "right" else -half_width), self.y + shift
        return self.x + shift, self.y + (half_height if name == "top" else -half_height)


class Sketch:
    """A picture of boxes and arrows.

    Args:
        width: In inches.
        height: Likewise.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = plt.figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.axis("off")

    def box(self, at: Point, text: str, fill: str = "plain", size: Point = (1.1, 0.5)) -> Box:
        """Draw a box around a centre."""
        x, y = at
        corner = (x - size[0] / 2, y - size[1] / 2)
        shape = FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.06", fc=FILLS[fill], ec=INK, lw=0.8)
        self.axes.add_patch(shape)
        self.note(at, text)
        return Box(x, y, *size)

    def note(self, at: Point, text: str, colour: str = INK, align: str = "center") -> None:
        """Write text around a point, or from it on."""
        self.axes.text(*at, text, ha=align, va="center", fontsize=8, color=colour, linespacing=1.25)

    def arrow(self, start: Point, end: Point, bend: str = "arc3", dashed: bool = False) -> None:
        """Draw an arrow; `bend` is matplotlib's connection style."""
        style = {"arrowstyle": "-|>", "lw": 0.9, "color": INK, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
        style |= {"connectionstyle": bend, "linestyle": "--" if dashed else "-"}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=style)

    def frame(self, boxes: list[Box]) -> Box:
        """Draw a dashed frame around boxes that belong together."""
        left, bottom = min(each.side("left")[0] for each in boxes), min(each.side("bottom")[1] for each in boxes)
        right, top = max(each.side("right")[0] for each in boxes), max(each.side("top")[1] for each in boxes)
        framed = Box((left + right) / 2, (bottom + top) / 2, right - left + 0.24, top - bottom + 0.2)
        corner = (framed.side("left")[0], framed.side("bottom")[1])
        self.axes.add_patch(Rectangle(corner, framed.width, framed.height, fc="none", ec=INK, lw=0.7, ls="--"))
        return framed

    def legend(self, at: Point, kinds: str) -> None:
        """Explain the fills that are named, from a point on."""
        x, y = at
        for kind in kinds.split():
            self.axes.add_patch(Rectangle((x, y - 0.06), 0.18, 0.12, fc=FILLS[kind], ec=INK, lw=0.6))
            self.note((x + 0.25, y), LEGEND[kind], align="left")
            x += 0.62 + 0.068 * len(LEGEND[kind])


def shape() -> Sketch:
    """The one shape of all detectors."""
    sketch = Sketch(8.6, 2.5)
    image = sketch.box((0.6, 1.3), "image", size=(0.8, 0.5))
    teacher = sketch.box((1.9, 1.95), "teacher", "frozen")
    student = sketch.box((3.3, 1.3), "student", "trained")
    pairs = sketch.box((4.6, 1.3), "pairs\ntarget, prediction", size=(1.15, 0.5))
    loss = sketch.box((4.6, 0.6), "loss\nin training", size=(1.15, 0.45))
    maps = sketch.box((5.9, 1.3), "maps\none a scale", "map", (0.95, 0.5))
    fusion = sketch.box((7.0, 1.3), "fusion", size=(0.8, 0.5))
    statistics = sketch.box((7.0, 2.1), "statistics\nof the maps", "measured", (0.95, 0.45))
    fused = sketch.box((8.05, 1.3), "anomaly\nmap", "map", (0.75, 0.5))
    score = sketch.box((8.05, 0.6), "score", size=(0.75, 0.45))
    sketch.arrow(image.side("top"), teacher.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(teacher.side("right"), student.side("top"), "angle,angleA=0,angleB=90")
    sketch.note((2.95, 2.08), "features")
    for left, right in ((image, student), (student, pairs), (pairs, maps), (maps, fusion), (fusion, fused)):
        sketch.arrow(left.side("right"), right.side("left"))
    sketch.arrow(pairs.side("bottom"), loss.side("top"))
    sketch.arrow(statistics.side("bottom"), fusion.side("top"))
    sketch.arrow(fused.side("bottom"), score.side("top"))
    sketch.legend((0.25, 0.15), "frozen trained measured map")
    return sketch


def _towers(sketch: Sketch, teacher: str, student: str, top: float, bottom: float) -> list[tuple[Box, Box]]:
    """Draw teacher and student beside each other, three scales each; return their boxes by scale."""
    image = sketch.box((0.55, (top + bottom) / 2), "image", size=(0.75, 0.5))
    scales = []
    for index, stride in enumerate((4, 8, 16)):
        x = 1.85 + 1.45 * index
        upper = sketch.box((x, top), f"{teacher}\nstride {stride}", "frozen")
        lower = sketch.box((x, bottom), f"{student}\nstride {stride}", "trained")
        if scales:
            for before, after in zip(scales[-1], (upper, lower), strict=True):
                sketch.arrow(before.side("right"), after.side("left"))
        scales.append((upper, lower))
    sketch.arrow(image.side("top"), scales[0][0].side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(image.side("bottom"), scales[0][1].side("left"), "angle,angleA=90,angleB=0")
    return scales


def _gather(sketch: Sketch, maps: list[Box], text: str, x: float) -> None:
    """Lead the maps to a fusion and its anomaly map."""
    y = maps[0].y
    fusion = sketch.box((x, y), text, size=(1.15, 0.62))
    fused = sketch.box((x + 1.25, y), "anomaly\nmap", "map", (0.8, 0.5))
    sketch.arrow(sketch.frame(maps).side("right"), fusion.side("left"))
    sketch.arrow(fusion.side("right"), fused.side("left"))


def stfpm() -> Sketch:
    """STFPM."""
    sketch = Sketch(8.2, 2.9)
    maps = []
    for upper, lower in _towers(sketch, "teacher", "student", 2.5, 0.75):
        each = sketch.box((upper.x, 1.62), "1 - cosine", "map", (0.85, 0.38))
        sketch.arrow(upper.side("bottom"), each.side("top"))
        sketch.arrow(lower.side("top"), each.side("bottom"))
        maps.append(each)
    _gather(sketch, maps, "upsample,\nmultiply", 6.2)
    sketch.legend((0.25, 0.2), "frozen trained map")
    return sketch


def asymts() -> Sketch:
    """AsymTS, and the layer its student is built of."""
    sketch = Sketch(8.2, 5.3)
    maps = []
    for upper, lower in _towers(sketch, "teacher", "CoT blocks", 4.95, 2.65):
        average = sketch.box((upper.x, 4.25), "moving average", "measured", (1.1, 0.34))
        each = sketch.box((upper.x, 3.5), "1 - cosine", "map", (0.85, 0.38))
        sketch.arrow(upper.side("bottom"), average.side("top"))
        sketch.arrow(average.side("bottom"), each.side("top"))
        sketch.arrow(lower.side("top"), each.side("bottom"))
        maps.append(each)
    _gather(sketch, maps, "each by its\nmean on normals,\nupsample, add", 6.2)
    sketch.axes.plot([0.2, 8.0], [2.2, 2.2], color=INK, lw=0.5, ls=":")
    sketch.note((0.25, 2.03), "Contextual Transformer (CoT) layer", align="left")
    features = sketch.box((0.75, 1.2), "features", size=(0.85, 0.45))
    static = sketch.box((2.3, 1.75), "keys: 3 x 3\ngroup convolution", "trained", (1.35, 0.42))
    kernels = sketch.box((4.2, 1.2), "two 1 x 1: a 3 x 3\nkernel a position", "trained", (1.35, 0.45))
    value = sketch.box((2.3, 0.62), "values: 1 x 1", "trained", (1.35, 0.36))
    dynamic = sketch.box((5.75, 0.62), "aggregate", size=(0.95, 0.36))
    gate = sketch.box((7.3, 1.2), "softmax gate\nweighs both", "trained", (1.1, 0.45))
    sketch.arrow(features.side("top"), static.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(features.side("bottom"), value.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(features.side("right"), kernels.side("left"))
    sketch.arrow(static.side("bottom"), (2.3, 1.21))
    sketch.arrow(value.side("right"), dynamic.side("left"))
    sketch.arrow(kernels.side("right"), dynamic.side("top"), "angle,angleA=0,angleB=90")
    sketch.arrow(static.side("right"), gate.side("top"), "angle,angleA=0,angleB=90")
    sketch.arrow(dynamic.side("right"), gate.side("bottom"), "angle,angleA=0,angleB=90")
    sketch.note((4.2, 1.86), "static context")
    sketch.note((6.75, 0.5), "dynamic context")
    sketch.legend((0.25, 0.2), "frozen trained measured map")
    return sketch


def fcl() -> Sketch:
    """FCL with SNC round a host."""
    sketch = Sketch(9.2, 2.9)
    for row in range(3):
        for column in range(3):
            centre = (row, column) == (1, 1)
            at = (0.6 + 0.42 * column, 2.45 - 0.42 * row)
            sketch.box(at, "e" if centre else "n", "frozen" if centre else "plain", (0.36, 0.36))
    sketch.note((1.02, 1.1), "SNC, radius 1: element e\nis coded by its\nneighbours n")
    host = sketch.box((2.85, 1.75), "host: STFPM,\nAsymTS or reverse", "trained", (1.3, 0.5))
    pairs = sketch.box((4.35, 1.75), "pairs", size=(0.75, 0.5))
    code = sketch.box((5.6, 2.5), "SNC of target\nand prediction", size=(1.2, 0.45))
    low = sketch.box((7.0, 2.5), "low-level:\nhost's distances", "map", (1.2, 0.45))
    whole = sketch.box((5.6, 1.0), "whole map,\naffinity, mean", size=(1.2, 0.45))
    high = sketch.box((7.0, 1.0), "high-level:\ndistances", "map", (1.2, 0.45))
    loss = sketch.box((7.0, 1.75), "loss", size=(1.2, 0.36))
    fusion = sketch.box((8.4, 2.5), "fusion,\nanomaly map", size=(1.1, 0.45))
    sketch.arrow(host.side("right"), pairs.side("left"))
    sketch.arrow(pairs.side("top"), code.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(pairs.side("bottom"), whole.side("left"), "angle,angleA=90,angleB=0")
    for left, right in ((code, low), (whole, high), (low, fusion)):
        sketch.arrow(left.side("right"), right.side("left"))
    sketch.arrow(low.side("bottom"), loss.side("top"))
    sketch.arrow(high.side("top"), loss.side("bottom"))
    sketch.legend((0.25, 0.2), "trained map")
    return sketch


def reverse() -> Sketch:
    """Reverse distillation with either bottleneck."""
    sketch = Sketch(9.0, 3.3)
    image = sketch.box((0.55, 2.9), "image", size=(0.75, 0.45))
    teacher, decoder, maps = [], [], []
    for index, stride in enumerate((4, 8, 16)):
        x = 1.75 + 1.3 * index
        teacher.append(sketch.box((x, 2.9), f"teacher\nstride {stride}", "frozen", (1.0, 0.45)))
        maps.append(sketch.box((x, 2.05), "1 - cosine", "map", (0.85, 0.36)))
        decoder.append(sketch.box((x, 1.2), f"decoder\nstride {stride}", "trained", (1.0, 0.45)))
        sketch.arrow(teacher[-1].side("bottom"), maps[-1].side("top"))
        sketch.arrow(decoder[-1].side("top"), maps[-1].side("bottom"))
    bottleneck = sketch.box((8.1, 2.9), "bottleneck", "trained", (1.2, 0.45))
    embedding = sketch.box((8.1, 1.2), "embedding", size=(1.2, 0.45))
    for left, right in ((image, teacher[0]), (teacher[0], teacher[1]), (teacher[1], teacher[2])):
        sketch.arrow(left.side("right"), right.side("left"))
    sketch.arrow(teacher[2].side("right"), bottleneck.side("left"))
    sketch.arrow(bottleneck.side("bottom"), embedding.side("top"))
    for right, left in ((embedding, decoder[2]), (decoder[2], decoder[1]), (decoder[1], decoder[0])):
        sketch.arrow(right.side("left"), left.side("right"))
    _gather(sketch, maps, "upsample, add,\nsmooth", 5.75)
    note = "convolutional: strides 4, 8, 16 to a grid at stride 32; dense: stride 16 to one vector"
    sketch.note((8.7, 0.72), note, align="right")
    sketch.legend((0.25, 0.2), "frozen trained map")
    return sketch


def efficientad() -> Sketch:
    """The student after EfficientAD."""
    sketch = Sketch(8.2, 3.4)
    image = sketch.box((0.55, 1.85), "image", size=(0.75, 0.45))
    teacher = sketch.box((1.9, 2.9), "teacher", "frozen", (1.0, 0.45))
    average = sketch.box((3.4, 2.9), "channels'\nmean, variance", "measured", (1.15, 0.45))
    targets = sketch.box((4.85, 2.9), "targets T", size=(0.85, 0.45))
    autoencoder = sketch.box((3.4, 1.85), "one vector,\ndecoder", "trained", (1.15, 0.45))
    decoded = sketch.box((4.85, 1.85), "decoded A", size=(0.85, 0.45))
    student = sketch.box((3.4, 0.8), "student,\ntwo heads", "trained", (1.15, 0.45))
    local = sketch.box((4.85, 1.02), "head S", size=(0.85, 0.34))
    other = sketch.box((4.85, 0.58), "head S'", size=(0.85, 0.34))
    first = sketch.box((6.2, 2.4), "(T - S)²", "map", (0.85, 0.36))
    second = sketch.box((6.2, 1.35), "(A - S')²", "map", (0.85, 0.36))
    fusion = sketch.box((7.5, 1.88), "quantiles,\nupsample, add", "measured", (1.1, 0.5))
    sketch.arrow(image.side("top"), teacher.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(image.side("bottom"), student.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(teacher.side("right"), average.side("left"))
    sketch.arrow(teacher.side("bottom"), autoencoder.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(average.side("right"), targets.side("left"))
    sketch.arrow(autoencoder.side("right"), decoded.side("left"))
    sketch.arrow(student.side("right", 0.1), local.side("left"))
    sketch.arrow(student.side("right", -0.1), other.side("left"))
    sketch.arrow(targets.side("right"), first.side("left"))
    sketch.arrow(local.side("right"), first.side("left", -0.08))
    sketch.arrow(decoded.side("right"), second.side("left", 0.08))
    sketch.arrow(other.side("right"), second.side("left", -0.08))
    sketch.arrow(first.side("right"), fusion.side("left", 0.1))
    sketch.arrow(second.side("right"), fusion.side("left", -0.1))
    sketch.arrow(targets.side("bottom"), decoded.side("top"), dashed=True)
    sketch.note((4.45, 2.37), "(T - A)²\nin training")
    sketch.legend((0.25, 0.15), "frozen trained measured map")
    return sketch


def associative() -> Sketch:
    """A network beside a memory of scenes."""
    sketch = Sketch(9.2, 3.5)
    image = sketch.box((0.5, 1.9), "image", size=(0.7, 0.45))
    teacher = sketch.box((1.6, 1.9), "teacher", "frozen", (0.85, 0.45))
    network = sketch.box((1.6, 3.1), "network", "trained", (0.85, 0.45))
    features = sketch.box((2.8, 1.9), "features,\nthree strides", size=(1.0, 0.45))
    found = sketch.box((4.1, 1.9), "descriptors\nat stride 8", "measured", (1.05, 0.45))
    code = sketch.box((2.8, 0.8), "code of\nthe scene", "measured", (1.0, 0.45))
    scenes = sketch.box((4.1, 0.8), "nearest blocks\nof alike scenes", "measured", (1.05, 0.45))
    attention = sketch.box((5.3, 0.8), "softmax\nattention", size=(0.9, 0.45))
    matched = sketch.box((6.5, 2.55), "1 - cosine of\ncodes, 3 strides", "map", (1.0, 0.45))
    remembered = sketch.box((6.5, 1.9), "half squared\ndistance", "map", (1.0, 0.45))
    y = (matched.y + remembered.y) / 2
    fusion = sketch.box((7.72, y), "geometric\nmean", "measured", (0.85, 0.5))
    fused = sketch.box((8.72, y), "anomaly\nmap", "map", (0.75, 0.5))
    sketch.arrow(image.side("top"), network.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(features.side("top"), matched.side("left"), "angle,angleA=90,angleB=0")
    sketch.arrow(network.side("right"), matched.side("top"), "angle,angleA=0,angleB=90")
    pairs = ((image, teacher), (teacher, features), (features, found), (found, remembered), (code, scenes))
    for left, right in (*pairs, (scenes, attention), (fusion, fused)):
        sketch.arrow(left.side("right"), right.side("left"))
    sketch.arrow(features.side("bottom"), code.side("top"))
    sketch.arrow((attention.x, found.y), attention.side("top"))
    sketch.note((attention.x - 0.07, 1.35), "query", align="right")
    sketch.arrow(attention.side("right"), remembered.side("bottom"), "angle,angleA=0,angleB=90")
    sketch.note((6.43, 1.35), "predicted", align="right")
    sketch.arrow(sketch.frame([matched, remembered]).side("right"), fusion.side("left"))
    sketch.legend((0.25, 0.2), "frozen trained measured map")
    return sketch


PICTURES: dict[str, Callable[[], Sketch]] = {
    each.__name__: each for each in (shape, stfpm, asymts, fcl, reverse, efficientad, associative)
}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the pictures' folder")
    parser.add_argument("--suffix", choices=("svg", "png"), default="svg")
    arguments = parser.parse_args()
    fonts = ["DejaVu Sans", "sans-serif"]
    mpl.rcParams.update({"svg.hashsalt": "proctor", "svg.fonttype": "none", "font.family": fonts})
    for name, draw in PICTURES.items():
        path = arguments.out / f"{name}.{arguments.suffix}"
        plain = {"Date": None, "Creator": None} if arguments.suffix == "svg" else None
        draw().figure.savefig(path, metadata=plain, dpi=110)
        plt.close("all")


if __name__ == "__main__":
    main()
