"""Writing the Delta table of results.

Promise: a commit of new rows names whole Parquet files that are durable before it, and it fails when another writer
has committed rows since the table was read. Whoever looks for repeats before it appends thus appends every frame once,
also beside a second writer.
"""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from workers import durable
from workers.errors import Overtaken, ResultsUnavailable
from workers.parquet import commit_statistics, write_parquet
from workers.results import SCHEMA
from workers.table import DAY, PARTITIONS, TABLE_ERRORS, ResultTable, is_in, partitions_of, with_day

FOR_READERS = "interval 1 days"  # how long files that the table no longer names stay for those who read them
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)  # see workers.upkeep
_APPLICATION = "proctor-compactor"
_CONFIGURATION = {
    "delta.dataSkippingStatsColumns": "captured_at,seq",
    "delta.deletedFileRetentionDuration": FOR_READERS,
    "delta.logRetentionDuration": FOR_READERS,
}


class TableWriter:
    """Commits to one table.

    Args:
        table: the table.

    Raises:
        ResultsUnavailable: by every method, when the table cannot be read or written.
    """

    def __init__(self, table: ResultTable) -> None:
        self._table = table

    def open_or_create(self) -> DeltaTable:
        """The table as it is now, made if there is none."""
        delta = self._table.open()
        if delta is not None:
            return delta
        if self._table.local and "%" in self._table.root:  # deltalake decodes it, and would write elsewhere
            raise ResultsUnavailable(
                f"the table of results cannot lie in {self._table.root}: a folder has a % in its name"
            )
        try:
            self._table.fs.create_dir(self._table.root, recursive=True)
            DeltaTable.create(
                self._table.address,
                SCHEMA.append(DAY),
                mode="ignore",
                partition_by=PARTITIONS,
                configuration=_CONFIGURATION,
                storage_options=self._table.options,
                raise_if_key_not_exists=False,
            )
            return DeltaTable(self._table.address, storage_options=self._table.options)
        except CommitFailedError:
            raise Overtaken(f"another compactor made the table {self._table.root} at the same moment") from None
        except TABLE_ERRORS as error:
            raise self._table.unavailable("write", error) from None

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
        version = delta.version()
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
            raise Overtaken(f"another compactor has written to {self._table.root} at the same moment") from None
        except TABLE_ERRORS as error:
            self._drop([action.path for action in added])
            raise self._table.unavailable("write", error) from None
        self.confirm(version)

    def confirm(self, version: int) -> None:
        """Bring version `version`, and those after it, onto the disk: whoever committed it may have been killed since.

        Rows that were found in this version survive a power cut when this returns.
        """
        self._sync_log(version - 1)

    def change(self, act: Callable[[DeltaTable], object]) -> None:
        """Let `deltalake` itself rewrite or delete files, and make durable what it wrote.

        Args:
            act: called with the table as it is now; commits at most once.
        """
        delta = self.open_or_create()
        before, known = delta.version(), {file.path for file in self._table.files(delta)}
        try:
            act(delta)
        except TABLE_ERRORS as error:
            raise self._table.unavailable("write", error) from None
        if not self._table.local:
            return
        try:
            for file in self._table.files(self.open_or_create()):
                if file.path not in known:
                    durable.sync(Path(self._table.root, file.path))
                    durable.sync(Path(self._table.root, file.path).parent)
        except OSError as error:
            raise self._table.unavailable("write", error) from None
        self._sync_log(before)

    def _write_files(self, rows: pa.Table) -> list[AddAction]:
        """One durable file for each partition; not yet part of the table."""
        written: list[AddAction] = []
        days = with_day(rows)
        try:
            for key in partitions_of(days):
                part = days.filter(is_in(key)).drop_columns(PARTITIONS).sort_by("captured_at")
                folder = f"product={key['product']}/day={key['day'].isoformat()}"
                path = f"{folder}/part-{uuid.uuid4().hex}.zstd.parquet"
                self._table.fs.create_dir(f"{self._table.root}/{folder}", recursive=True)
                write_parquet(self._table.fs, f"{self._table.root}/{path}", part)
                if self._table.local:
                    durable.sync(Path(self._table.root, folder).parent)
                    durable.sync(Path(self._table.root))
                    durable.sync(Path(self._table.root).parent)
                size = self._table.fs.get_file_info(f"{self._table.root}/{path}").size
                values = {"product": key["product"], "day": key["day"].isoformat()}
                statistics = commit_statistics(part, ("captured_at", "seq"))
                written.append(AddAction(path, size, values, int(time.time() * 1e3), True, statistics))
        except TABLE_ERRORS as error:
            self._drop([action.path for action in written])
            raise self._table.unavailable("write", error) from None
        return written

    def _drop(self, paths: list[str]) -> None:
        """Delete files that were not committed, but only where the table can be read and does not name them."""
        try:
            delta = self._table.open()
            if delta is None:
                return
            named = {file.path for file in self._table.files(delta)}
            for path in paths:
                if path not in named:
                    self._table.fs.delete_file(f"{self._table.root}/{path}")
        except (ResultsUnavailable, OSError):
            return  # then the upkeep deletes them when they are old

    def _sync_log(self, after: int) -> None:
        """Bring the commits after version `after` onto the disk; an object store does that by itself."""
        if not self._table.local:
            return
        log = Path(self._table.root, "_delta_log")
        try:
            while (commit := log / f"{(after := after + 1):020d}.json").exists():
                durable.sync(commit)
            durable.sync(log)
        except OSError as error:
            raise self._table.unavailable("write", error) from None
