"""`proctor results`: selecting rows and showing them."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from cluster.config import ProctorConfig
from cluster.errors import ProctorError
from workers.reading import read_results
from workers.results import HEAVY, SCHEMA

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
VERDICTS = ("pass", "fail", "unknown")


def parse_since(text: str, option: str = "--since") -> datetime:
    """A time as `2026-01-31T06:00` (local unless it names its zone) or an age as `90s`, `15m`, `8h`, `7d`.

    Raises:
        ProctorError: neither.
    """
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        if age:
            return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: float(age[1])})
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ProctorError(
            f"{option} {text!r}: give a time as 2026-01-31T06:00 or an age as 90s, 15m, 8h, 7d"
        ) from None


def read_selection(
    config: ProctorConfig, product: str | None, since: str | None, verdict: str | None, *, heavy: bool
) -> pa.Table:
    """Rows in order of capture, each frame once; maps and images only if `heavy`."""
    if verdict is not None and verdict not in VERDICTS:
        raise ProctorError(f"--verdict {verdict!r}: one of {', '.join(VERDICTS)}")
    columns = [name for name in SCHEMA.names if heavy or name not in HEAVY]
    table = read_results(
        config.results.uri, product=product, since=parse_since(since) if since else None, columns=columns
    )
    return table if verdict is None else table.filter(pc.equal(table["verdict"], verdict))


def result_table(table: pa.Table, limit: int) -> Table:
    """The newest rows for people."""
    shown = table.slice(max(0, table.num_rows - limit))
    title = f"{table.num_rows:,} results" + (f", the newest {limit}" if table.num_rows > limit else "")
    view = Table(title=title, title_justify="left", title_style="bold")
    for name in ("frame", "captured (UTC)", "verdict", "score", "threshold", "total", "version", "reason"):
        view.add_column(name, justify="right" if name in ("score", "threshold", "total") else "left", overflow="fold")
    colours = {"fail": "red", "pass": "green", "unknown": "yellow"}
    for row in shown.to_pylist():
        view.add_row(
            row["frame_id"],
            f"{row['captured_at']:%Y-%m-%d %H:%M:%S.%f}"[:-3],
            Text(row["verdict"], style=colours[row["verdict"]]),
            "-" if row["score"] is None else f"{row['score']:.4g}",
            "-" if row["threshold"] is None else f"{row['threshold']:.4g}",
            f"{row['total_ms']:.0f} ms",
            row["model_version"] or "-",
            row["reason"] or "",
        )
    return view


def write_results(table: pa.Table, form: str, to: Path | None) -> None:
    """Write rows as json, csv, parquet or mere frame ids to a file or standard output.

    Raises:
        ProctorError: the file cannot be written.
    """
    try:
        if to is None:
            _write(table, form, sys.stdout.buffer)
            return
        with open(to, "wb") as file:
            _write(table, form, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ProctorError(f"cannot write {to}: {error.strerror}") from None


def _write(table: pa.Table, form: str, sink: BinaryIO) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if form == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif form == "ids":
        sink.write("".join(f"{frame_id}\n" for frame_id in table["frame_id"].to_pylist()).encode())
    elif form == "json":
        sink.write(json.dumps(table.to_pylist(), indent=1, default=_plain).encode() + b"\n")
    else:
        pyarrow.csv.write_csv(table, sink)


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
