"""The Delta table of results: `{uri}/table`, partitioned by `product` and `day`, the date of `captured_at` in UTC.

Promise: a commit holds whole Parquet files that are durable before the commit names them, and it fails when
another writer has committed rows since the table was read. Whoever looks for repeats before it appends thus
appends every frame once, also beside a second writer.
"""

import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from workers import durable
from workers.errors import Overtaken, ResultsUnavailable
from workers.parquet import commit_statistics, write_parquet
from workers.results import SCHEMA, filesystem

DAY = pa.field("day", pa.date32(), nullable=False)
PARTITIONS = ["product", "day"]
FOR_READERS = "interval 1 days"  # how long files that the table no longer names stay for those who read them
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)  # see workers.upkeep
_APPLICATION = "proctor-compactor"
_CONFIGURATION = {
    "delta.dataSkippingStatsColumns": "captured_at,seq",
    "delta.deletedFileRetentionDuration": FOR_READERS,
    "delta.logRetentionDuration": FOR_READERS,
}
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
        uri: the results' folder or URI. The store's options and credentials come from the environment.

    Raises:
        ResultsUnavailable: no such kind of place. Every method raises it when the table cannot be read or written.
    """

    def __init__(self, uri: str) -> None:
        self.fs, root = filesystem(uri)
        self.root = f"{root}/table"
        self._delta_uri = _delta_uri(uri, root, isinstance(self.fs, pafs.LocalFileSystem))

    @property
    def local(self) -> bool:
        """Whether it lies on this machine's file system."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    # --- reading

    def open(self) -> DeltaTable | None:
        """The table as it is now; None before its first commit."""
        try:
            return DeltaTable(self._delta_uri)
        except TABLE_ERRORS as error:
            if self._has_commits():
                raise self.unavailable("read", error) from None
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
        for key in _partitions_of(with_day(rows)):
            here |= _is_in(key)
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

    # --- writing

    def open_or_create(self) -> DeltaTable:
        """The table as it is now, made if there is none."""
        delta = self.open()
        if delta is not None:
            return delta
        try:
            self.fs.create_dir(self.root, recursive=True)
            DeltaTable.create(
                self._delta_uri,
                SCHEMA.append(DAY),
                mode="ignore",
                partition_by=PARTITIONS,
                configuration=_CONFIGURATION,
                raise_if_key_not_exists=False,
            )
            return DeltaTable(self._delta_uri)
        except CommitFailedError:
            raise Overtaken(f"another compactor made the table {self.root} at the same moment") from None
        except TABLE_ERRORS as error:
            raise self.unavailable("write", error) from None

    def append(self, delta: DeltaTable, rows: pa.Table) -> None:
        """Commit rows of which `delta` holds none; when this returns, they survive a power cut.

        Args:
            delta: the table as it was when repeats were looked for.
            rows: of `workers.results.SCHEMA`.

        Raises:
            Overtaken: another writer has committed rows since; nothing of these was committed.
            ResultsUnavailable: nothing of these was committed, as far as can be known.
        """
        added: list[AddAction | RemoveAction] = [*self._write_files(rows)]
        try:
            transaction = Transaction(_APPLICATION, (delta.transaction_version(_APPLICATION) or 0) + 1)
            delta.create_write_transaction(
                added,
                "append",
                delta.schema(),
                PARTITIONS,
                commit_properties=CommitProperties(app_transactions=[transaction]),
                post_commithook_properties=NO_HOOKS,
            )
        except CommitFailedError:
            self._drop([action.path for action in added])
            raise Overtaken(f"another compactor has written to {self.root} at the same moment") from None
        except TABLE_ERRORS as error:
            self._drop([action.path for action in added])
            raise self.unavailable("write", error) from None
        self.sync_log(delta.version())

    def change(self, act: Callable[[DeltaTable], object]) -> None:
        """Let `deltalake` itself rewrite or delete files, and make durable what it wrote.

        Args:
            act: called with the table as it is now; commits at most once.
        """
        delta = self.open_or_create()
        before, known = delta.version(), {file.path for file in self.files(delta)}
        try:
            act(delta)
        except TABLE_ERRORS as error:
            raise self.unavailable("write", error) from None
        if not self.local:
            return
        try:
            for file in self.files(self.open_or_create()):
                if file.path not in known:
                    durable.sync(Path(self.root, file.path))
                    durable.sync(Path(self.root, file.path).parent)
        except OSError as error:
            raise self.unavailable("write", error) from None
        self.sync_log(before)

    def _write_files(self, rows: pa.Table) -> list[AddAction]:
        """One durable file for each partition; not yet part of the table."""
        written: list[AddAction] = []
        days = with_day(rows)
        try:
            for key in _partitions_of(days):
                part = days.filter(_is_in(key)).drop_columns(PARTITIONS).sort_by("captured_at")
                folder = f"product={key['product']}/day={key['day'].isoformat()}"
                path = f"{folder}/part-{uuid.uuid4().hex}.zstd.parquet"
                self.fs.create_dir(f"{self.root}/{folder}", recursive=True)
                write_parquet(self.fs, f"{self.root}/{path}", part)
                if self.local:
                    durable.sync(Path(self.root, folder).parent)
                    durable.sync(Path(self.root))
                size = self.fs.get_file_info(f"{self.root}/{path}").size
                values = {"product": key["product"], "day": key["day"].isoformat()}
                statistics = commit_statistics(part, ("captured_at", "seq"))
                written.append(AddAction(path, size, values, int(time.time() * 1e3), True, statistics))
        except TABLE_ERRORS as error:
            self._drop([action.path for action in written])
            raise self.unavailable("write", error) from None
        return written

    def _drop(self, paths: list[str]) -> None:
        """Delete files that were not committed, but only where the table can be read and does not name them."""
        try:
            delta = self.open()
            if delta is None:
                return
            named = {file.path for file in self.files(delta)}
            for path in paths:
                if path not in named:
                    self.fs.delete_file(f"{self.root}/{path}")
        except (ResultsUnavailable, OSError):
            return  # then the upkeep deletes them when they are old

    def sync_log(self, after: int) -> None:
        """Bring the commits after version `after` onto the disk; an object store does that by itself."""
        if not self.local:
            return
        log = Path(self.root, "_delta_log")
        try:
            while (commit := log / f"{(after := after + 1):020d}.json").exists():
                durable.sync(commit)
            durable.sync(log)
        except OSError as error:
            raise self.unavailable("write", error) from None

    def unavailable(self, what: str, error: Exception) -> ResultsUnavailable:
        """The error for whoever asked, in one line without colours."""
        line = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        return ResultsUnavailable(f"cannot {what} the table {self.root}: {line}")


def with_day(rows: pa.Table) -> pa.Table:
    """Rows with their partition's day, the date of `captured_at` in UTC."""
    return rows.append_column(DAY, pc.cast(rows["captured_at"], DAY.type))


def _partitions_of(days: pa.Table) -> list[dict[str, Any]]:
    return days.group_by(PARTITIONS).aggregate([]).to_pylist()


def _is_in(partition: dict[str, Any]) -> pads.Expression:
    return (pads.field("product") == partition["product"]) & (pads.field("day") == pa.scalar(partition["day"]))


def first_of_each(rows: pa.Table) -> pa.Table:
    """The first row of every frame, in the given order."""
    numbers = pa.table({"frame_id": rows["frame_id"], "row": pa.array(range(rows.num_rows), pa.int64())})
    first = numbers.group_by("frame_id").aggregate([("row", "min")])["row_min"]
    return rows if len(first) == rows.num_rows else rows.take(first.sort())


def _delta_uri(uri: str, root: str, local: bool) -> str:
    """The address as `deltalake` takes it, without the query that pyarrow.fs reads its options from."""
    if local:
        return Path(root, "table").as_uri()
    return urlsplit(uri)._replace(query="", fragment="").geturl().rstrip("/") + "/table"
