"""Small files on local disk, NFS or an object store, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from models.errors import VersionError

Result = TypeVar("Result")


class Storage:
    """A folder behind a `pyarrow.fs` address; paths below are relative to it, with '/'.

    Args:
        uri: Local path, `file://` or `s3://` address.

    Raises:
        VersionError: The address cannot be used.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" not in text:
            text = Path(text).expanduser().absolute().as_uri()
        self.uri = text

        def connect() -> tuple[pafs.FileSystem, str]:
            filesystem, path = pafs.FileSystem.from_uri(text)
            return filesystem, path.rstrip("/")

        self._fs, self._root = self._translated("open", "", connect)
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders in a folder, sorted; none where it does not exist."""
        selector = pafs.FileSelector(self._full(path), allow_not_found=True)

        def look() -> list[pafs.FileInfo]:
            try:
                return self._fs.get_file_info(selector)
            except FileNotFoundError:
                return []  # Arrow missed it, then found it when it asked again: it is being made just now

        infos = self._translated("list", path, look)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def exists(self, path: str) -> bool:
        """Return whether there is a file of that name."""
        info = self._translated("read", path, lambda: self._fs.get_file_info(self._full(path)))
        return info.type == pafs.FileType.File

    def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises:
            VersionError: Missing or unreadable.
        """

        def load() -> bytes:
            with self._fs.open_input_stream(self._full(path)) as file:
                return file.read()

        return self._translated("read", path, load)

    def claim(self, path: str) -> bool:
        """Make a new folder; return False when it is there already, so that of two writers one gets it."""

        def make() -> bool:
            if not self.is_local:
                # An object store has no exclusive folders; the id's random digits keep two publishers apart.
                return self._fs.get_file_info(self._full(path)).type == pafs.FileType.NotFound
            folder = Path(self._full(path))
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                return False
            return True

        return self._translated("write", path, make)

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or none of it, also after a power cut.

        Raises:
            VersionError: The disk is full, read-only or away; nothing of the file is left.
        """
        self._translated("write", path, lambda: self._write(self._full(path), data))

    def remove(self, path: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        try:
            self._fs.delete_dir(self._full(path))
        except (OSError, pa.ArrowException):
            return  # what stays has no model.json, so nobody takes it for a version

    def _write(self, full: str, data: bytes) -> None:
        if not self.is_local:
            # An object store shows an object only when its upload is complete.
            self._fs.create_dir(full.rsplit("/", 1)[0], recursive=True)
            with self._fs.open_output_stream(full) as file:
                file.write(data)
            return
        final = Path(full)
        part = final.with_name(f".{final.name}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)
        _fsync_folder(final.parent)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _translated(self, verb: str, path: str, action: Callable[[], Result]) -> Result:
        """Run `action`, with the file system's errors as one line that names the place."""
        try:
            return action()
        except (OSError, pa.ArrowException) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            place = f"{self.uri}/{path}" if path else self.uri
            raise VersionError(f"registry: cannot {verb} {place}: {reason.splitlines()[0]}") from None


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable: the name itself lives in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
