"""The Delta table of results: `{uri}/table`, partitioned by `product` and `day`, the date of `captured_at` in UTC.

Reading it, and what its log says; `workers.table_writer` writes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from workers.errors import ResultsUnavailable
from workers.results import SCHEMA, filesystem

DAY = pa.field("day", pa.date32(), nullable=False)
PARTITIONS = ["product", "day"]
TABLE_ERRORS = (DeltaError, OSError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class TableFile:
    """One Parquet file of the table.

    Attributes:
        path: below the table's root.
        product: of all its rows.
        day: on which all its rows were captured, UTC.
        rows: how many.
        size: in bytes.
    """

    path: str
    product: str
    day: date
    rows: int
    size: int


class ResultTable:
    """The table below `{uri}/table`.

    Args:
        uri: the results' folder or URI. A store's credentials come from the environment.

    Attributes:
        fs: where it lies, as pyarrow.fs has it.
        root: its folder there.
        address: of that folder, as `deltalake` takes it.
        options: for `deltalake`.

    Raises:
        ResultsUnavailable: no such kind of place. Every method raises it when the table cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.fs, root = filesystem(uri)
        self.root = f"{root}/table"
        self.address = Path(self.root).as_uri() if self.local else _without_query(uri) + "/table"
        self.options = _store_options(uri)

    @property
    def local(self) -> bool:
        """Whether it lies on this machine's file system."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def open(self) -> DeltaTable | None:
        """The table as it is now; None before its first commit."""
        there = False
        for _ in range(2):  # it may be made, or its log be cleaned, at this very moment
            try:
                return DeltaTable(self.address, storage_options=self.options)
            except TABLE_ERRORS as error:
                if there:  # since before this opening, so it was not made meanwhile
                    raise self.unavailable("read", error) from None
                there = self._has_commits()
        return None

    def _has_commits(self) -> bool:
        log = pafs.FileSelector(f"{self.root}/_delta_log", allow_not_found=True)
        try:
            return any(info.extension in ("json", "parquet") for info in self.fs.get_file_info(log))
        except OSError as error:
            raise self.unavailable("read", error) from None

    def read(self, columns: Sequence[str], chosen: pads.Expression) -> pa.Table:
        """Columns of the chosen rows; files that cannot hold any by their partition or times are not opened."""
        delta = self.open()
        if delta is None:
            return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()
        try:
            return self._dataset(delta).to_table(columns=list(columns), filter=chosen).replace_schema_metadata()
        except TABLE_ERRORS as error:
            raise self.unavailable("read", error) from None

    def absent(self, delta: DeltaTable, rows: pa.Table) -> pa.Table:
        """Those of `rows` whose frames the table does not hold.

        Only the ids and numbers of the partitions of these rows are read, a piece at a time: a frame's capture
        time, and with it its partition, is the same however often it is judged. Its number is part of its id, so
        files of other numbers are not opened.
        """
        numbers = pc.min_max(rows["seq"]).as_py()
        alike = (
            (pads.field("seq") >= numbers["min"])
            & (pads.field("seq") <= numbers["max"])
            & pads.field("frame_id").isin(rows["frame_id"].combine_chunks())
        )
        here = pads.scalar(False)
        for key in partitions_of(with_day(rows)):
            here |= is_in(key)
        try:
            known = self._dataset(delta).to_table(columns=["frame_id"], filter=here & alike)
        except TABLE_ERRORS as error:
            raise self.unavailable("read", error) from None
        if not known.num_rows:
            return rows
        return rows.filter(pc.invert(pc.is_in(rows["frame_id"], known["frame_id"].combine_chunks())))

    def files(self, delta: DeltaTable) -> list[TableFile]:
        """The table's files, from its log alone."""
        try:
            actions = pa.table(delta.get_add_actions(flatten=True))
        except TABLE_ERRORS as error:
            raise self.unavailable("read", error) from None
        names = ("path", "partition.product", "partition.day", "num_records", "size_bytes")
        if not actions.num_rows:
            return []
        return [TableFile(*row) for row in zip(*(actions[name].to_pylist() for name in names), strict=True)]

    def _dataset(self, delta: DeltaTable) -> pads.Dataset:
        return delta.to_pyarrow_dataset(filesystem=pafs.SubTreeFileSystem(self.root, self.fs))

    def unavailable(self, what: str, error: Exception) -> ResultsUnavailable:
        """The error for whoever asked, in one line without colours."""
        line = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        return ResultsUnavailable(f"cannot {what} the table {self.root}: {line}")


def with_day(rows: pa.Table) -> pa.Table:
    """Rows with their partition's day, the date of `captured_at` in UTC."""
    return rows.append_column(DAY, pc.cast(rows["captured_at"], DAY.type))


def partitions_of(days: pa.Table) -> list[dict[str, Any]]:
    """Product and day of every partition that `with_day` rows go into."""
    return days.group_by(PARTITIONS).aggregate([]).to_pylist()


def is_in(partition: dict[str, Any]) -> pads.Expression:
    """That a row belongs into this partition."""
    return (pads.field("product") == partition["product"]) & (pads.field("day") == pa.scalar(partition["day"]))


def first_of_each(rows: pa.Table) -> pa.Table:
    """The first row of every frame, in the given order."""
    numbers = pa.table({"frame_id": rows["frame_id"], "row": pa.array(np.arange(rows.num_rows))})
    first = numbers.group_by("frame_id").aggregate([("row", "min")])["row_min"]
    return rows if len(first) == rows.num_rows else rows.take(first.sort())


def _without_query(uri: str) -> str:
    return urlsplit(uri)._replace(query="", fragment="").geturl().rstrip("/")


def _store_options(uri: str) -> dict[str, str]:
    """What the query of an S3 URI says to pyarrow.fs, in the words of `deltalake`."""
    query = dict(parse_qsl(urlsplit(uri).query))
    options = {}
    if "region" in query:
        options["AWS_REGION"] = query["region"]
    if "endpoint_override" in query:
        scheme = query.get("scheme", "https")
        options["AWS_ENDPOINT_URL"] = f"{scheme}://{query['endpoint_override']}"
        options["AWS_ALLOW_HTTP"] = str(scheme == "http").lower()
    return options
