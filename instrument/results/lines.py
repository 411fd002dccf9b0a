"""The one validated reader of a results folder's files: records, line by line, and single JSON objects.

What is wrong is a `Defect` with its file and line, and everything else is kept; who cannot work with a part of a file calls
`read`, which raises. A log may lie there plain, or gzipped as a packed campaign has it (``run_x.jsonl.gz``). What is read must
lie in the folder: links are not followed, pipes and devices are not opened. Torch-free, and without numpy.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import msgspec

from instrument.results.schemas import UNREADABLE, AnyRecord, Record, RecordError, decode

CHUNK_BYTES = 4 << 20
LARGEST_INTEGER = 2**63 - 1
LARGEST_BYTES = 1 << 30
"""Of an unpacked log. A step log has some hundred bytes a step; a few MB of gzip can hold terabytes of one letter."""
LONGEST_TEXT = 300
"""Characters of a defect: a broken line may hold a megabyte."""
Row = TypeVar("Row")


@dataclass(frozen=True)
class Defect:
    """One thing that was left out or repaired. ``line`` counts from 1; None: the whole file."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"


def defect(file: str, line: int | None, what: object) -> Defect:
    """A defect whose text stays short and on one line."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(what)[: 4 * LONGEST_TEXT].split()))
    return Defect(file, line, text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ...")


def read(path: Path, kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The records of a log in order; raises `RecordError` naming file and line at the first defect, and FileNotFoundError."""
    stored(path, path.name)[0].lstat()
    defects: list[Defect] = []
    for chunk in chunks(path, path.name, defects):
        for row in chunk.rows(lambda line: record(line, kind), defects):
            if defects:
                break
            yield row
    if defects:
        raise RecordError(str(replace(defects[0], file=str(path))))


def read_lines(path: Path, parse: Callable[[bytes], Row], name: str) -> tuple[list[Row], list[Defect]]:
    """What ``parse`` (`json_object`, or `record` of a kind) gives for the lines of a log in order, and what was wrong with the
    others. ``name`` is ``path`` seen from the results folder, for the defects. A file that is not there has no rows."""
    defects: list[Defect] = []
    return [row for chunk in chunks(path, name, defects) for row in chunk.rows(parse, defects)], defects


def read_one(path: Path, parse: Callable[[bytes], Row], name: str) -> tuple[Row | None, list[Defect]]:
    """A file that is one record or object as ``parse`` gives it: `json_object`, or `record` of a kind. None without
    a defect: there is no such file. Raises OSError for a file that cannot be read now."""
    if refused := outside(path, name):
        return None, refused
    try:
        return parse(path.read_bytes()), []
    except FileNotFoundError:
        return None, []
    except (*UNREADABLE, IsADirectoryError) as error:
        return None, [defect(name, None, error)]


def record(line: bytes, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a line, or `RecordError`: no count of ours needs more than 63 bits, and no column holds more."""
    row = decode(line, kind)
    if (field := too_large(row)) is not None:
        raise RecordError(f"{field} is too large for a 64-bit integer")
    return row


def too_large(row: Record) -> str | None:
    """The first field whose integer does not fit a column, or None."""
    values = zip(row.__struct_fields__, msgspec.structs.astuple(row), strict=True)
    return next((n for n, value in values if type(value) is int and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER), None)


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line, or `RecordError`."""
    try:
        found = msgspec.json.decode(line)
    except UNREADABLE as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"is a {type(found).__name__} and not an object")
    return found


@dataclass(frozen=True)
class Chunk:
    """Some megabytes of a log: its lines, newlines included, and the number of the first."""

    name: str
    first: int
    lines: list[bytes]

    def rows(self, parse: Callable[[bytes], Row], defects: list[Defect]) -> Iterator[Row]:
        """What ``parse`` gives for every line; a line that it refuses is a defect."""
        for number, line in enumerate(self.lines, start=self.first):
            try:
                yield parse(line)
            except UNREADABLE as error:
                torn = "" if line.endswith(b"\n") else " (torn last line)"
                defects.append(defect(self.name, number, f"{error}{torn}"))


def chunks(path: Path, name: str, defects: list[Defect]) -> Iterator[Chunk]:
    """The lines of a log. A file that is not there has none; a gzip file that is not whole, or too large, gives what
    comes before, and a defect."""
    path, name = stored(path, name)
    if refused := outside(path, name):
        defects += refused
        return
    line, read_bytes, zipped = 1, 0, path.suffix == ".gz"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            while found := file.readlines(CHUNK_BYTES) if not zipped else _bounded(file, CHUNK_BYTES):
                read_bytes += sum(map(len, found))
                if zipped and read_bytes > LARGEST_BYTES:
                    defects.append(defect(name, line, f"unpacks to more than {LARGEST_BYTES >> 20} MiB: the rest is left out"))
                    return
                yield Chunk(name, line, found)
                line += len(found)
    except (FileNotFoundError, IsADirectoryError):
        return
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        defects.append(defect(name, line, f"not a whole gzip file: {error}"))


def stored(path: Path, name: str) -> tuple[Path, str]:
    """The log ``path``, and its name, or its gzipped form where only that is there."""
    zipped = path.with_name(f"{path.name}.gz")
    if path.exists() or path.is_symlink() or not (zipped.exists() or zipped.is_symlink()):
        return path, name
    return zipped, f"{name}.gz"


def outside(path: Path, name: str) -> list[Defect]:
    """A defect when ``path``, which is ``name`` seen from the results folder, is a link, lies below one, or is
    a pipe or a device."""
    depth = len(PurePosixPath(name).parts)
    for place in (path, *path.parents[: depth - 1]):
        if place.is_symlink():
            return [defect(name, None, f"{place.name!r} is a link, and links in a results folder are not followed: left out")]
    if path.exists() and not path.is_file() and not path.is_dir():
        return [defect(name, None, "is no plain file: left out")]
    return []


def _bounded(file: IO[bytes] | gzip.GzipFile, chunk_bytes: int) -> list[bytes]:
    """As ``readlines``, but no line is longer than `LARGEST_BYTES`, which ends the reading."""
    found, size = [], 0
    while size < chunk_bytes and (line := file.readline(LARGEST_BYTES + 1)):
        found.append(line)
        size += len(line)
    return found
