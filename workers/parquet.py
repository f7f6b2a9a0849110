"""The table's Parquet files: how they are written and what a commit says of them."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from workers import durable
from workers.results import HEAVY

GROUP_ROWS = 65_536


def write_parquet(fs: pafs.FileSystem, path: str, rows: pa.Table) -> None:
    """Write one durable file, to be named by a commit.

    Raises:
        OSError: the file is not there.
    """
    light = [name for name in rows.column_names if name not in (*HEAVY, "frame_id")]

    def fill(sink: Any) -> None:
        pq.write_table(rows, sink, row_group_size=GROUP_ROWS, compression="zstd", use_dictionary=light)

    durable.write_unnamed(fs, path, fill)


def commit_statistics(rows: pa.Table, columns: Sequence[str]) -> str:
    """A file's statistics as the Delta log holds them: number of rows, least and greatest of `columns`."""
    least, greatest = {}, {}
    for name in columns:
        bounds = pc.min_max(rows[name]).as_py()
        least[name], greatest[name] = _plain(bounds["min"]), _plain(bounds["max"])
    return json.dumps(
        {
            "numRecords": rows.num_rows,
            "minValues": least,
            "maxValues": greatest,
            "nullCount": dict.fromkeys(columns, 0),
        }
    )


def holds_any(fs: pafs.FileSystem, path: str, columns: Sequence[str]) -> bool:
    """Whether a Parquet file has a value in one of `columns`, from its footer alone.

    Raises:
        OSError: it cannot be read.
    """
    with fs.open_input_file(path) as source:
        footer = pq.read_metadata(source)
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema in columns and (
                column.statistics is None or column.statistics.null_count != group.num_rows
            ):
                return True
    return False


def _plain(value: Any) -> Any:
    return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if hasattr(value, "strftime") else value
