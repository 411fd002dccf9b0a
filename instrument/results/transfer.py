"""A run's files on their way to another results folder: of a shard, merged; from another machine, packed, checked and
written. Torch-free."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from instrument.results import files
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import finished_run, finished_runs, require_no_links
from instrument.results.layout import MACHINE, RUNS, TRACES, RunFiles
from instrument.results.repair import FileState, Repair
from instrument.results.schemas import encode, is_safe, require_safe
from instrument.terminal import count


class MergeRefused(Exception):
    """Folders that cannot become one."""


class TransferError(Exception):
    """Files that arrived are not what was sent, or do not belong to the run."""


@dataclass(frozen=True)
class PackedFile:
    """``path`` in the results folder, with slashes; ``data``: its bytes [size] uint8, mapped from the disk."""

    path: str
    sha256: str
    data: np.ndarray


def files_of(out: Path, run_id: str) -> Iterator[Path]:
    """A run's plain files in the results folder ``out`` but its row: no links, nothing hidden."""
    run, inside = RunFiles(out, run_id), []
    traces = (out / TRACES).glob(f"{run_id}-step*.json.gz")
    for folder, folders, names in os.walk(run.path):  # follows no links
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in (run.log("steps"), run.trace(), *traces, *sorted(inside)):
        if path != run.row and files.plain_inside(out, path):
            yield path


def merge(out: Path, others: Sequence[Path], done: Repair) -> None:
    """Copy the finished runs of other results folders (shards of one matrix) into ``out``, where it has no row of them.
    ``done.merged`` gets their ids. Raises `MergeRefused` for a folder of another device, OSError where ``out`` cannot be
    written. A run's row comes last, so that the next merge brings a run again whose copy was interrupted."""
    for other in others:
        _require_same_device(out, other)
    for other in others:
        for row in finished_runs(other):
            ours = finished_run(out, row.run_id)
            if ours is None:
                try:
                    _copy_run(other, out, row.run_id)
                    done.merged.append(row.run_id)
                except RunClaimed:
                    done.in_use.append(row.run_id)
            elif encode(ours) != encode(row):
                notes = [f"{ours.status}; {other} has another row of this run ({row.status}): left there"]
                done.files.append(FileState(f"{RUNS}/{row.run_id}/run.json", intact=1, notes=notes))
        if left := sum(finished_run(other, path.name) is None for path in (other / RUNS).glob("*/")):
            done.files.append(FileState(f"{other}/{RUNS}", notes=[f"{count(left, 'run')} without a readable row: left there"]))
        if files.plain_inside(other, other / MACHINE) and not (out / MACHINE).exists():
            files.copy(other / MACHINE, out / MACHINE)


def _require_same_device(out: Path, other: Path) -> None:
    if out.resolve() == other.resolve():
        raise MergeRefused(f"--merge {other}: is the folder to merge into")
    ours, theirs = ({row.device for row in finished_runs(folder)} for folder in (out, other))
    if not theirs:
        raise MergeRefused(f"--merge {other}: no finished run in it; give a results folder, which holds runs/")
    if ours and theirs - ours:
        raise MergeRefused(
            f"--merge {other}: its runs are of {', '.join(sorted(theirs))} and those of {out} of "
            f"{', '.join(sorted(ours))}; a results folder holds one device"
        )


def _copy_run(other: Path, out: Path, run_id: str) -> None:
    with claim(out, run_id):
        for path in (*files_of(other, run_id), RunFiles(other, run_id).row):
            files.copy(path, out / path.relative_to(other))


def pack(out: Path, run_id: str) -> list[PackedFile]:
    """A run's plain files in the results folder ``out``, the machine's facts first and the row last."""
    packed = []
    for path in [out / MACHINE, *files_of(out, run_id), RunFiles(out, run_id).row]:
        if files.plain_inside(out, path):
            with files.open_plain(path) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                data = np.asarray(np.memmap(file, np.uint8, "r")) if size_bytes else np.empty(0, np.uint8)
            packed.append(PackedFile(path.relative_to(out).as_posix(), hashlib.sha256(data).hexdigest(), data))
    return packed


def unpack(out: Path, run_id: str, packed: list[PackedFile]) -> None:
    """Put a run's files into the results folder ``out``, in place of all that the run has there; its row comes last, so that
    what breaks off leaves an unfinished run and not a wrong one. Raises `TransferError`, before anything is touched, for a name
    outside of the run's places or other content than was sent; `OutputError` for a link, OSError for a full disk."""
    require_safe(run_id)
    times = Counter(one.path for one in packed)
    for one in packed:
        if times[one.path] > 1 or not _is_the_runs(run_id, one.path):
            raise TransferError(f"{one.path[:120]!r} has no place among the files of {run_id}")
        if hashlib.sha256(one.data).hexdigest() != one.sha256:
            raise TransferError(f"{one.path}: what came is not what was sent (SHA-256 differs)")
        if link := next((out / folder for folder in Path(one.path).parents[:-1] if (out / folder).is_symlink()), None):
            raise TransferError(f"{link} is a link, and links in a results folder are not followed")
    require_no_links(out, run_id)
    row = f"{RUNS}/{run_id}/run.json"
    files.remove(out / row)  # a row must not stand beside another execution's files
    for path in list(files_of(out, run_id)):
        if path.relative_to(out).as_posix() not in times:
            files.remove(path)
    for folder in RunFiles(out, run_id).path.glob("[!.]*/"):
        if not any(folder.iterdir()):
            files.remove_folder(folder)
    for one in sorted(packed, key=lambda one: one.path == row):
        if one.path != MACHINE or not (out / MACHINE).exists():
            files.replace(out / one.path, one.data)


def _is_the_runs(run_id: str, path: str) -> bool:
    """Whether a path names a file of this run, spelled in the one way that is allowed."""
    parts, name = PurePosixPath(path).parts, re.escape(run_id)
    if "/".join(parts) != path or not all(map(is_safe, parts)):
        return False
    pattern = rf"machine\.json|runs/{name}/.+|training_logs/run_{name}\.jsonl|traces/{name}(-step[0-9]+)?\.json\.gz"
    return re.fullmatch(pattern, path) is not None
