"""The results' table: what folding costs, what a read of a day costs, and what a segment costs beside it.

    python -m benchmarks.results_table --json benchmarks/results/results_table.json

Writes one day of light rows (no evidence) of two products with four cameras each as segments of 256 rows and folds
them into the table after every quarter of an hour; reads the table before and after the day's files are merged. Then a
backlog of rows with maps and images of 20 kB is folded at once. Memory is the peak of this process over what it needs
before. Everything lies on one local disk and is read from the system's cache.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from workers.compactor import Compactor
from workers.reading import read_results
from workers.results import HEAVY, MAP_SIZE, SCHEMA, Row, SegmentWriter
from workers.segments import Segments
from workers.settings import ResultsSettings
from workers.table import ResultTable, TableFile
from workers.upkeep import Upkeep

_DAY = datetime(2026, 1, 31, tzinfo=UTC)
_SEGMENT_ROWS, _CAMERAS, _IMAGE_BYTES, _QUARTERS = 256, 8, 20_000, 96
_LIGHT = [name for name in SCHEMA.names if name not in HEAVY]


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="light rows of the day")
    parser.add_argument("--heavy-rows", type=int, default=20_000, help="rows with map and image")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        light = _measure_day(f"{folder}/light", options.rows)
        heavy = _measure_heavy(f"{folder}/heavy", options.heavy_rows)
    document = {"machine": describe_machine(), "light": light, "with_evidence": heavy}
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text, end="")


def _measure_day(uri: str, rows: int) -> dict[str, Any]:
    segment_ms: list[float] = []
    rounds_s: list[float] = []
    for quarter in range(_QUARTERS):
        segment_ms += _write(uri, range(rows * quarter // _QUARTERS, rows * (quarter + 1) // _QUARTERS), rows, None)
        rounds_s.append(_fold(uri)["seconds"])
    table = ResultTable(uri)
    reads = {"before_merging": _reads(uri, rows)}
    files = len(_files(table))
    merging_s = _seconds(Upkeep(table, ResultsSettings(), lambda: _DAY + timedelta(days=2)).run)
    reads["after_merging"] = _reads(uri, rows)
    return {
        "rows": rows,
        "segment_rows": _SEGMENT_ROWS,
        "segment_write_ms_p50": round(statistics.median(segment_ms), 3),
        "folding": {
            "rounds": _QUARTERS,
            "rows_per_s": round(rows / sum(rounds_s)),
            "first_round_ms": round(rounds_s[0] * 1e3),
            "median_round_ms": round(statistics.median(rounds_s) * 1e3),
            "last_round_ms": round(rounds_s[-1] * 1e3),
        },
        "files_before_merging": files,
        "merging_s": round(merging_s, 3),
        "table_bytes": sum(file.size for file in _files(table)),
        "reads_ms": reads,
    }


def _files(table: ResultTable) -> list[TableFile]:
    delta = table.open()
    assert delta is not None
    return table.files(delta)


def _measure_heavy(uri: str, rows: int) -> dict[str, Any]:
    segment_ms = _write(uri, range(rows), rows, _IMAGE_BYTES)
    size = sum(info.size for info in Segments(uri).closed())
    folding = _fold(uri)
    return {
        "rows": rows,
        "image_bytes": _IMAGE_BYTES,
        "segment_write_ms_p50": round(statistics.median(segment_ms), 3),
        "folding": folding | {"mb_per_s": round(size / 1e6 / folding["seconds"], 1)},
    }


def _write(uri: str, numbers: range, rows: int, image_bytes: int | None) -> list[float]:
    """Write some of the day's rows; returns the milliseconds of each segment."""
    writer = SegmentWriter(uri, "bench")
    took = []
    for first in range(0, len(numbers), _SEGMENT_ROWS):
        segment = [_row(number, rows, image_bytes) for number in numbers[first : first + _SEGMENT_ROWS]]
        started = time.perf_counter()
        writer.write(segment)
        took.append((time.perf_counter() - started) * 1e3)
    return took


def _row(number: int, rows: int, image_bytes: int | None) -> Row:
    product, camera = ("bolt", "nut")[number % 2], f"cam-{number % _CAMERAS // 2}"
    seq = (int(_DAY.timestamp()) << 20) + number // _CAMERAS
    return Row(
        frame_id=f"{product}/{camera}/{seq}",
        product=product,
        camera=camera,
        seq=seq,
        captured_at=_DAY + timedelta(days=1) * (number / rows),
        verdict="fail" if number % 100 == 0 else "pass",
        score=number % 997 / 997,
        threshold=0.99,
        model_version="20260130T014512-3fa9",
        detector="stfpm",
        reason=None,
        queue_ms=number % 31 / 10,
        infer_ms=6.5,
        total_ms=8.0 + number % 31 / 10,
        replica="bench",
        map_u8=os.urandom(MAP_SIZE * MAP_SIZE) if image_bytes else None,
        map_min=0.0 if image_bytes else None,
        map_max=1.0 if image_bytes else None,
        image_jpeg=os.urandom(image_bytes) if image_bytes else None,
    )


def _fold(uri: str) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak_kb()
    compactor = Compactor(Segments(uri), ResultTable(uri))
    started = time.perf_counter()
    folded = compactor.fold_all()
    seconds = time.perf_counter() - started
    return {
        "segments": folded.segments,
        "seconds": round(seconds, 3),
        "rows_per_s": round(folded.rows / seconds),
        "peak_memory_growth_mb": round((_peak_kb() - before) / 1024),
    }


def _peak_kb() -> int:
    """Peak of this process's memory (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _reads(uri: str, rows: int) -> dict[str, float]:
    """Milliseconds of the reads that people and programs do, the median of five."""
    number = rows // 2
    cases: dict[str, Callable[[], Any]] = {
        "day_all_light_columns": lambda: read_results(uri, columns=_LIGHT),
        "day_two_columns": lambda: read_results(uri, columns=["verdict", "score"]),
        "last_15_minutes": lambda: read_results(uri, since=_DAY + timedelta(hours=23, minutes=45), columns=_LIGHT),
        "one_product_last_hour": lambda: read_results(
            uri, product="nut", since=_DAY + timedelta(hours=23), columns=_LIGHT
        ),
        "one_frame": lambda: read_results(uri, frame_ids=[_row(number, rows, None).frame_id]),
    }
    return {name: round(statistics.median(_seconds(read) for _ in range(5)) * 1e3, 1) for name, read in cases.items()}


def _seconds(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
