"""The documents of `proctor bench` as tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Document = dict[str, Any]


def engine_tables(document: Document) -> list[Table]:
    """The figures that matter, then every row."""
    batch, products = document["batch"], document["products"]
    swap = document["hot_swap_ms"]
    figures = [
        ("batch, one product", f"{document['single_fps']:,.0f} frames/s", ""),
        (f"batch, {products} products", f"{document['mixed_fps']:,.0f} frames/s", _of(document["mixed_to_single"])),
        (f"batch, {products} products by Zipf", f"{document['zipf_fps']:,.0f} frames/s", ""),
        (f"a network for each of {products} products", f"{document['peer_fps']:,.0f} frames/s", ""),
        ("  the engine against it", f"{document['mixed_to_peer']:.1f} times", ""),
        ("PyTorch, eager float32, one product", f"{document['fp32_eager_fps']:,.0f} frames/s", ""),
        ("  the engine against it", f"{document['single_to_fp32_eager']:.1f} times", ""),
        ("one frame by itself", f"{document['batch_1_ms']:.2f} ms", ""),
        ("swap of a version", f"{swap['install']:.2f} ms", ""),
        ("longest batch while versions are built", f"{swap['longest_batch']:.1f} ms", ""),
    ]
    title = f"ResNet-18 pair, batches of {batch}, {document['device']}, {document['dtype']}{_manner(document)}"
    rows = [
        (
            f"{row['detector']}, {row['teacher']}, {row['input_size']}²",
            *(str(row[name]) for name in ("batch", "products", "mix")),
            f"{row['fps']:,.0f}",
            f"{row['ms_per_batch']:.2f}",
            f"{row['of_peak'] * 100:.1f}",
            f"{row['bytes_per_product'] / 1e6:.1f}",
        )
        for row in document["rows"]
    ]
    names = ("network", "batch", "products", "mix", "frames/s", "ms a batch", "% of peak", "MB a product")
    return [_table(title, ("", "", ""), figures), _table("every measurement", names, rows)]


def stream_table(document: Document) -> Table:
    """A row for each input."""
    names = ("input", "kB a frame", "frames/s", "MB/s", "p50 ms", "p99 ms", "plain frames/s", "of plain")
    rows = [
        (
            row["input"],
            f"{row['bytes_per_frame'] / 1e3:.0f}",
            f"{row['fps']:,.0f}",
            f"{row['mb_per_s']:,.0f}",
            *_latency(row),
            f"{row['plain_fps']:,.0f}",
            _of(row["to_plain"]),
        )
        for row in document["rows"]
    ]
    return _table(f"publish, read, settle: {document['server']}, batches of {document['batch']}", names, rows)


def pipeline_table(document: Document) -> Table:
    """A column for each input: the loop beside each stage alone."""
    inputs = document["rows"]
    figures: dict[str, list[str]] = {
        f"{stage}, frames/s": [f"{row['stages_fps'][stage]:,.0f}" for row in inputs]
        for stage in inputs[0]["stages_fps"]
    }
    figures |= {
        "loop, frames/s": [f"{row['loop_fps']:,.0f}" for row in inputs],
        "  of the slowest stage": [_of(row["loop_to_slowest"]) for row in inputs],
        "  of the bound": [_of(row["loop_to_bound"]) for row in inputs],
        "p50 at half load, ms": [_latency(row)[0] for row in inputs],
        "p99 at half load, ms": [_latency(row)[1] for row in inputs],
        "  its bound, ms": [f"{row['latency_bound_ms']:.1f}" for row in inputs],
    }
    title = f"each stage alone and the loop: {document['network']}, {document['device']}{_manner(document)}"
    return _table(title, ("", *(row["input"] for row in inputs)), [(name, *row) for name, row in figures.items()])


def _manner(document: Document) -> str:
    """How it was measured, as far as figures are worth less or more by it."""
    threads = f", threads: {document['threads']}" if document["device"] == "cpu" else ""
    if "decode_threads" in document:
        threads += f", to decode: {document['decode_threads']}"
    return threads + (", quick: no figure to quote" if document["quick"] else "")


def _latency(row: Document) -> tuple[str, str]:
    latency = row["latency_ms_at_half_load"]
    return f"{latency['p50']:.1f}", f"{latency['p99']:.1f}"


def _of(share: float) -> str:
    return f"{share * 100:.0f} %"


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(names))
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
