"""Logs as they lie in a folder: plain, or gzipped as a packed campaign has them (``run_x.jsonl.gz``)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from report.load.defect import Defect, defect

LARGEST_BYTES = 1 << 30
"""Of an unpacked log. A step log has some hundred bytes a step; a few MB of gzip can hold terabytes of one letter."""


def stored(path: Path, name: str) -> tuple[Path, str]:
    """The log ``path`` (``name`` seen from the results folder), or its gzipped form where only that is there."""
    zipped = path.with_name(f"{path.name}.gz")
    if path.exists() or path.is_symlink() or not (zipped.exists() or zipped.is_symlink()):
        return path, name
    return zipped, f"{name}.gz"


def lines(path: Path, name: str, defects: list[Defect], chunk_bytes: int) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a log, some megabytes at a time, with the number of each chunk's first. A file that is not there has
    none; a gzip file that is not whole, or too large, gives what comes before, and a defect."""
    line, read_bytes, zipped = 1, 0, path.suffix == ".gz"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            while found := file.readlines(chunk_bytes) if not zipped else _bounded(file, chunk_bytes):
                read_bytes += sum(map(len, found))
                if zipped and read_bytes > LARGEST_BYTES:
                    defects.append(defect(name, line, f"unpacks to more than {LARGEST_BYTES >> 20} MiB: the rest is left out"))
                    return
                yield line, found
                line += len(found)
    except (FileNotFoundError, IsADirectoryError):
        return
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        defects.append(defect(name, line, f"not a whole gzip file: {error}"))


def _bounded(file: gzip.GzipFile, chunk_bytes: int) -> list[bytes]:
    """As ``readlines``, but no line is longer than `LARGEST_BYTES`, which ends the reading."""
    found, size = [], 0
    while size < chunk_bytes and (line := file.readline(LARGEST_BYTES + 1)):
        found.append(line)
        size += len(line)
    return found
