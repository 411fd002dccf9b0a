"""A run's files on their way between two machines that share no disk: listed, read in chunks, checked, written.

The one who receives trusts nothing: names stay inside the run's own places, no link is followed, sizes and
SHA-256 must be those that were listed, and the row comes last, so that a parcel that breaks off leaves an
unfinished run and not a wrong one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.repair.merge import files_of
from harness.run_folder import require_no_links
from instrument import files
from instrument.run_id import is_safe, require_safe

CHUNK_BYTES = 4 << 20
MACHINE = "machine.json"

Wanted = tuple[str, int]
"""A path and an offset in bytes: the chunk that the receiver needs next."""


class ParcelError(Exception):
    """What came is not what was listed, or has no business there."""


@dataclass(frozen=True)
class Item:
    """A file of a parcel: its path in the results folder, with slashes."""

    path: str
    size_bytes: int
    sha256: str


def contents(out: Path, run_id: str) -> list[Item]:
    """A run's plain files in the results folder ``out``, the machine's facts first and the row last."""
    row = out / "runs" / run_id / "run.json"
    paths = [out / MACHINE, *files_of(out, run_id), row]
    return [_item(out, path) for path in paths if files.plain_inside(out, path)]


def chunk(out: Path, items: list[Item], wanted: Wanted) -> bytes:
    """A chunk of a listed file; raises `ParcelError` for one that is not listed."""
    path, offset = wanted
    if path not in {item.path for item in items}:
        raise ParcelError(f"{path!r} is not in the parcel")
    fd = os.open(out / path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)


def receive(out: Path, run_id: str, items: list[Item]) -> Generator[Wanted, bytes, None]:
    """Put a run's files into the results folder ``out``: yields what it wants and is sent that chunk.

    Whatever the run had there and is not in the parcel goes. Raises `ParcelError`, and OSError where ``out``
    cannot be written. Close it to give up: no half file stays.
    """
    require_safe(run_id)
    _refuse_foreign(run_id, items)
    require_no_links(out, run_id)
    row = f"runs/{run_id}/run.json"
    files.remove(out / row)  # a row must not stand beside another attempt's files
    for item in items:
        if item.path != row and not (item.path == MACHINE and (out / MACHINE).exists()):
            yield from _receive_file(out, item)
    _remove_others(out, run_id, {item.path for item in items})
    for item in items:
        if item.path == row:
            yield from _receive_file(out, item)


def _item(out: Path, path: Path) -> Item:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return Item(
            path.relative_to(out).as_posix(), os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )


def _refuse_foreign(run_id: str, items: list[Item]) -> None:
    seen = set()
    for item in items:
        if item.path in seen or not _is_the_runs(run_id, item.path) or item.size_bytes < 0:
            raise ParcelError(f"{item.path[:120]!r} has no place among the files of {run_id}")
        seen.add(item.path)


def _is_the_runs(run_id: str, path: str) -> bool:
    """Whether a path names a file of this run, spelled in the one way that is allowed."""
    parts = PurePosixPath(path).parts
    if "/".join(parts) != path or not all(map(is_safe, parts)):
        return False
    name = re.escape(run_id)
    return (
        path == MACHINE
        or (len(parts) > 2 and parts[:2] == ("runs", run_id))
        or re.fullmatch(rf"training_logs/run_{name}\.jsonl|traces/{name}(-step[0-9]+)?\.json\.gz", path) is not None
    )


def _receive_file(out: Path, item: Item) -> Generator[Wanted, bytes, None]:
    target, digest, left_bytes = out / item.path, hashlib.sha256(), item.size_bytes
    for folder in target.relative_to(out).parents:
        if (out / folder).is_symlink() and out / folder != out:
            raise ParcelError(f"{out / folder} is a link, and links in a results folder are not followed")
    with files.replacing(target) as temporary, temporary.open("wb") as file:
        while left_bytes:
            data = yield item.path, item.size_bytes - left_bytes
            if not 0 < len(data) <= left_bytes:
                raise ParcelError(f"{item.path}: {len(data)} bytes came where {left_bytes} or fewer were wanted")
            file.write(data)
            digest.update(data)
            left_bytes -= len(data)
        if digest.hexdigest() != item.sha256:
            raise ParcelError(f"{item.path}: what came is not what was sent (SHA-256 differs)")


def _remove_others(out: Path, run_id: str, listed: set[str]) -> None:
    for path in list(files_of(out, run_id)):
        if path.relative_to(out).as_posix() not in listed:
            files.remove(path)
    for folder in sorted((out / "runs" / run_id).glob("*/")):
        if not folder.name.startswith(".") and not any(folder.iterdir()):
            files.remove_folder(folder)
