"""The pictures of `benchmarks.engine` and `benchmarks.pipeline`; the only module here that loads matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _GRID, _OURS, _PLAIN, _OTHER, _LOOP = "#1d2530", "#d5dae1", "#0072B2", "#D55E00", "#56B4E9", "#009E73"
_MARKERS = {"even": "o", "zipf": "s"}
_FONT = 9


def plot_engine(document: dict[str, Any], to: Path) -> None:
    """Draw frames a second over the batch and over the number of products, and the share of the device's peak.

    Args:
        document: of `benchmarks.engine`.
        to: the file to write.
    """
    networks = list(dict.fromkeys(row["network"] for row in document["rows"]))
    swept = [name for name in networks if len(_of(document, name, products=1)) > 1]
    figure = Figure(figsize=(11, 3.4 * len(swept)), layout="constrained")
    for axes, name in zip(figure.subplots(len(swept), 3, squeeze=False), swept, strict=True):
        first = _of(document, name)[0]
        _draw_batches(axes[0], _of(document, name, products=1), document, name)
        _draw_products(axes[1], document, name)
        _draw_share(axes[2], _of(document, name, products=1))
        axes[0].set_title(f"{first['detector']}, {first['teacher']}, {first['input_size']}²", fontsize=10, loc="left")
    where = document["machine"]["gpu"] or f"{document['machine']['processor']}, {document['threads']} threads"
    figure.suptitle(f"Engine on {where}, {document['dtype']}", fontsize=11, x=0.01, ha="left", color=_INK)
    _save(figure, to)


def _draw_batches(axes: Axes, rows: list[dict[str, Any]], document: dict[str, Any], name: str) -> None:
    batches = [row["batch"] for row in rows]
    axes.plot(batches, [row["fps"] for row in rows], "o-", color=_OURS, label="engine, one product")
    low, high = ([row[which] for row in rows] for which in ("fps_p10", "fps_p90"))
    axes.fill_between(batches, low, high, color=_OURS, alpha=0.2, lw=0)
    if name == "pair":
        axes.plot(document["batch"], document["fp32_eager_fps"], "D", color=_PLAIN, label="PyTorch, eager float32")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(each) for each in batches])
    _dress(axes, "frames in a batch", "frames/s")


def _draw_products(axes: Axes, document: dict[str, Any], name: str) -> None:
    for mix, colour in (("even", _OURS), ("zipf", _OTHER)):
        one = [row for row in _of(document, name, products=1) if row["batch"] == document["batch"]]
        rows = one + [row for row in _of(document, name, mix=mix) if row["products"] > 1]
        counts = [row["products"] for row in rows]
        label = f"engine, {'evenly mixed' if mix == 'even' else 'mixed by Zipf'}"
        axes.plot(counts, [row["fps"] for row in rows], f"{_MARKERS[mix]}-", color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(each) for each in counts])
    if name == "pair":
        axes.plot(document["products"], document["peer_fps"], "D", color=_PLAIN, label="a network for each product")
    _dress(axes, f"products in batches of {document['batch']}", "frames/s")


def _draw_share(axes: Axes, rows: list[dict[str, Any]]) -> None:
    batches = [str(row["batch"]) for row in rows]
    axes.bar(batches, [row["of_peak"] * 100 for row in rows], color=_OURS)
    _dress(axes, "frames in a batch", "% of the largest matrix product's FLOP/s", legend=False)


def plot_pipeline(document: dict[str, Any], to: Path) -> None:
    """Draw each stage alone, and what all cores allow, as bars beside the loop, a panel for each input.

    Args:
        document: of `benchmarks.pipeline`.
        to: the file to write.
    """
    rows = document["rows"]
    figure = Figure(figsize=(4 * len(rows), 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        bars = row["stages_fps"] | {"all cores": row["cores_fps"], "loop": row["loop_fps"]}
        colours = [_OURS] * len(row["stages_fps"]) + [_OTHER, _LOOP]
        drawn = axes.bar(list(bars), list(bars.values()), color=colours)
        axes.bar_label(drawn, fmt="{:,.0f}", fontsize=_FONT, color=_INK, padding=2)
        axes.set_title(f"{row['input']}: {row['loop_to_bound'] * 100:.0f} % of the bound", fontsize=10)
        axes.tick_params(axis="x", rotation=30)
        axes.set_yscale("log")
        axes.margins(y=0.12)
        _dress(axes, "", "frames/s", legend=False, from_zero=False)
    _save(figure, to)


def _of(document: dict[str, Any], network: str, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["network"] == network and wanted.items() <= row.items()]


def _dress(axes: Axes, across: str, up: str, *, legend: bool = True, from_zero: bool = True) -> None:
    axes.set_xlabel(across, fontsize=_FONT)
    axes.set_ylabel(up, fontsize=_FONT)
    if from_zero:
        axes.set_ylim(0, axes.dataLim.y1 * 1.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_FONT, labelcolor=_INK)
    if legend:
        axes.legend(fontsize=_FONT - 1, frameon=False)


def _save(figure: Figure, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130, facecolor="white")
