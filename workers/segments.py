"""Closed segments as the compactor and readers see them: which there are, what they hold, damaged ones aside.

Below the results' root: `segments/` with what replicas wrote, `damaged/` with what could not be read.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from producers.errors import FrameError
from producers.frame import check_product
from workers.errors import DamagedSegment, ResultsUnavailable
from workers.results import SCHEMA, filesystem

LEFTOVER_AGE = timedelta(hours=1)  # a segment is written in milliseconds

logger = logging.getLogger(__name__)


class Segments:
    """The segments below `{uri}/segments`.

    Args:
        uri: a folder or a pyarrow.fs URI.

    Raises:
        ResultsUnavailable: no such kind of place. Every method raises it when the place does not answer.
    """

    def __init__(self, uri: str) -> None:
        self._fs, root = filesystem(uri)
        self._folder, self._damaged = f"{root}/segments", f"{root}/damaged"

    def closed(self) -> list[pafs.FileInfo]:
        """All segments in the order of their writing; names begin with the time."""
        infos = [info for info in self._files(self._folder) if _is_segment(info)]
        return sorted(infos, key=lambda info: info.base_name)

    def damaged(self) -> list[str]:
        """Paths of the segments that were set aside."""
        return sorted(info.path for info in self._files(self._damaged))

    def read(self, path: str) -> pa.Table | None:
        """One segment's rows, checked in full; None when it has gone, which only a folded segment does.

        Raises:
            DamagedSegment: it is not what a replica writes.
        """
        try:
            with self._fs.open_input_file(path) as source:
                content = source.read_buffer()  # first of all, so that what fails later is the content's fault
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResultsUnavailable(f"cannot read {path}: {error}") from None
        try:
            table = pa.ipc.open_file(content).read_all()
            table.validate(full=True)
            _check(table)
        except (pa.ArrowException, OSError, FrameError) as error:
            raise DamagedSegment(f"{path} is damaged: {' '.join(str(error).split())}") from None
        return table

    def read_columns(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of each segment in the order of their writing; other columns are not even read.

        A segment that vanishes meanwhile has been folded into the table: whoever reads that next finds its rows.
        """
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in columns])
        for info in self.closed():
            try:
                with self._fs.open_input_file(info.path) as source:
                    yield pa.ipc.open_file(source, options=options).read_all().select(columns)
            except FileNotFoundError:
                continue
            except (OSError, pa.ArrowException, KeyError) as error:
                line = " ".join(str(error).split())
                raise ResultsUnavailable(f"cannot read results in {_root(self._folder)}: {info.path}: {line}") from None

    def remove(self, paths: Iterable[str]) -> None:
        """Delete segments whose rows are durable elsewhere; one that has gone already is no error."""
        for path in paths:
            try:
                self._fs.delete_file(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ResultsUnavailable(f"cannot delete {path}: {error}") from None

    def set_aside(self, path: str) -> None:
        """Move a damaged segment out of the way, beside the segments' folder."""
        try:
            self._fs.create_dir(self._damaged, recursive=True)
            self._fs.move(path, f"{self._damaged}/{path.rpartition('/')[2]}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ResultsUnavailable(f"cannot move {path} to {self._damaged}: {error}") from None

    def remove_leftovers(self, now: datetime | None = None) -> int:
        """Delete what writers left that were killed while they wrote; returns how many files."""
        oldest = (now or datetime.now(UTC)) - LEFTOVER_AGE
        left = [
            info.path
            for info in self._files(self._folder)
            if info.base_name.startswith(".") and info.base_name.endswith(".arrow.tmp") and info.mtime < oldest
        ]
        self.remove(left)
        return len(left)

    def _files(self, folder: str) -> list[pafs.FileInfo]:
        try:
            infos = self._fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        except OSError as error:
            raise ResultsUnavailable(f"cannot read results in {_root(folder)}: {error}") from None
        return [info for info in infos if info.type == pafs.FileType.File]


def _is_segment(info: pafs.FileInfo) -> bool:
    return info.base_name.endswith(".arrow") and not info.base_name.startswith(".")


def _root(folder: str) -> str:
    return folder.rpartition("/")[0]


def _check(table: pa.Table) -> None:
    """Raise when `table` could not go into the table as it is."""
    if not table.schema.equals(SCHEMA):
        raise pa.ArrowInvalid("its columns are not those of results")
    for field in SCHEMA:
        if not field.nullable and table[field.name].null_count:
            raise pa.ArrowInvalid(f"{field.name} is missing in a row")
    for product in pc.unique(table["product"]).to_pylist():
        check_product(product)  # it becomes a folder's name
