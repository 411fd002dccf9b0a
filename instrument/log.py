"""Writing result files so that a reader never meets half a line of ours.

Appending opens, writes one whole line in one call and syncs on close of the log; replacing
writes a temporary file in the same folder and renames it. Torch-free.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from instrument.records import AnyRecord, Record, RecordError, decode, encode


class JsonlLog:
    """An append-only file of one kind of record. ``fresh`` starts it over."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0)
        self._fd = os.open(path, flags, 0o644)
        self.path = path

    def write(self, record: Record) -> None:
        """Append one line: a single write call on an O_APPEND descriptor."""
        append_all(self._fd, encode(record) + b"\n")

    def close(self) -> None:
        """Sync to disk and close; a second call does nothing."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def append_all(fd: int, data: bytes) -> None:
    """Write all of ``data``; the kernel may take a part of it at a time."""
    while data:
        data = data[os.write(fd, data):]


def replace(path: Path, data: bytes) -> None:
    """Replace a file's content in one step: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        append_all(fd, data)
        os.fsync(fd)
        os.close(fd)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path, kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The records of a file in order; raises `RecordError` naming file and line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield decode(line, kind)
            except RecordError as error:
                raise RecordError(f"{path}:{number}: {error}") from error
