"""A run's own folder, written; the rows of all runs, and the index over them."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from instrument.results.files import (
    locked,
    locked_temporary,
    make_folder,
    remove,
    remove_folder,
    replace,
    require_there,
    sweep,
    truncate,
)
from instrument.results.layout import INDEX, INDEX_LOCK, MACHINE, PINNED_LOGS, RUNS, STEP_LOGS, TRACES, RunFiles, runs_of
from instrument.results.lines import Defect, defect, read_lines, read_one, record
from instrument.results.log import JsonlLog
from instrument.results.schemas import RunRecord, encode, is_safe, require_safe
from instrument.terminal import FIXABLE

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


class OutputError(Exception):
    """A results folder that cannot be written."""

    @classmethod
    def of(cls, error: OSError, out: Path) -> OutputError:
        """What the system said while something was written to ``out``."""
        return cls(f"cannot write {error.filename or out}: {error.strerror}; choose another folder with --out")


def output_error(error: OSError, out: Path) -> OutputError | None:
    """What ``error`` says of the results folder ``out``: the run stops there, with what it wrote intact. None when it is about
    something else."""
    where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    ours = where is None or where.is_relative_to(out) or where.resolve().is_relative_to(out.resolve())
    if not out.is_dir():
        return OutputError(f"{out} has disappeared while the run was writing to it; put it back, or choose another with --out")
    if ours and (error.errno in OF_THE_DISK or (error.errno in {errno.ENOENT, *FIXABLE} and where is not None)):
        return OutputError(
            f"cannot write {where or out}: {os.strerror(error.errno or 0)}; what was written before is intact, and "
            f"the same command resumes the run when that is mended (or choose another folder with --out)"
        )
    return None


class RunFolder:
    """``runs/<run_id>/`` and ``training_logs/run_<run_id>.jsonl`` of one run: started over, or with ``kept_bytes`` (sizes of
    `log_paths`, by path) resumed, its logs cut to these sizes."""

    def __init__(self, out: Path, run_id: str, kept_bytes: Mapping[str, int] | None = None) -> None:
        require_safe(run_id)
        require_writable(out)
        require_no_links(out, run_id)
        self.out, self.files = out, RunFiles(out, run_id)
        self.path = self.files.path
        try:
            for place in (out, out / STEP_LOGS, out / TRACES, self.path):
                sweep(place)  # what dead writers left
            of_its_end = self.files.forensics, self.files.culprit, self.files.weights, self.files.log("hardware")
            for file in (self.files.row, *of_its_end):
                remove(file)  # the old row and what explains it must not outlive its logs
            remove_folder(self.files.snapshot)
            for name in log_paths(run_id).values():
                if kept_bytes is not None and (out / name).exists():
                    truncate(out / name, kept_bytes.get(name, 0))
            if kept_bytes is None:
                remove(self.files.log("activations"))
            self.steps, self.evaluations, self.events = (
                JsonlLog(self.files.log(name), fresh=kept_bytes is None) for name in ("steps", "evaluations", "events")
            )
        except OSError as error:
            raise OutputError.of(error, out) from error
        self._inodes = {log.path: _inode(log.path) for log in (self.steps, self.evaluations, self.events)}

    def check_logs(self) -> None:
        """Raise `FileNotFoundError` with the first log that is not there, or is another: what is written to a deleted file is
        lost without an error."""
        for path, inode in self._inodes.items():
            if _inode(path) != inode:
                raise FileNotFoundError(errno.ENOENT, "deleted or replaced while the run was writing to it", str(path))

    def finish(self, record: RunRecord) -> None:
        """Close the logs, then write the terminal row and the index; not into a folder that has gone away meanwhile."""
        self.close()
        require_there(self.path)
        write_terminal(self.out, record)

    def close(self) -> None:
        for log in (self.steps, self.evaluations, self.events):
            log.close()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def log_paths(run_id: str) -> dict[str, str]:
    """A run's logs that a checkpoint keeps the sizes of, by their paths in the results folder."""
    return {name: RunFiles(Path(), run_id).log(name).as_posix() for name in PINNED_LOGS}


def write_terminal(out: Path, record: RunRecord) -> None:
    """A run's terminal row and the index with it."""
    replace(RunFiles(out, record.run_id).row, encode(record) + b"\n")
    write_index(out)


def require_no_links(out: Path, run_id: str) -> None:
    """Raise `OutputError` where a link would lead a run's files out of the results folder."""
    for place in (out / STEP_LOGS, out / TRACES, out / RUNS, out / RUNS / run_id):
        if place.is_symlink():
            raise OutputError(
                f"{place} is a link, and links in a results folder are not followed; put the whole folder elsewhere with --out"
            )


def require_writable(out: Path) -> None:
    """Make the folder; raises `OutputError` with the reason when it cannot be written."""
    try:
        make_folder(out)
        probe, fd = locked_temporary(out, ".writable.")
        os.close(fd)
        remove(probe)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error


def write_machine(out: Path, facts: dict[str, object]) -> None:
    """``machine.json``: the machine that the folder's runs were made on, written once."""
    if not (out / MACHINE).exists():
        replace(out / MACHINE, json.dumps(facts, indent=1).encode() + b"\n")


def finished_run(out: Path, run_id: str) -> RunRecord | None:
    """The terminal row of a run, or None when it has none of its own that can be read. Raises OSError: what a disk does not
    give now is no unfinished run."""
    return _own_row(RunFiles(out, run_id))[0] if is_safe(run_id) else None


def settled_run(out: Path, run_id: str) -> RunRecord | None:
    """The terminal row of a run that need not be run again: a result, not an accident."""
    row = finished_run(out, run_id)
    return row if row is not None and row.status in ("completed", "diverged", "unsupported") else None


def finished_runs(out: Path) -> list[RunRecord]:
    """Every readable terminal row of a results folder, by run id."""
    return [row for run in runs_of(out) if (row := finished_run(out, run.run_id)) is not None]


def indexed_rows(out: Path) -> dict[str, RunRecord]:
    """The readable rows that the index holds now, by run id; of one that comes twice the first."""
    return _indexed(out)[0]


def read_rows(out: Path) -> tuple[tuple[RunRecord, ...], list[Defect]]:
    """One valid row per run id, by run id, and everything that was left out with its reason: a run's own row is the truth,
    and the index's row counts where there is no other."""
    own: dict[str, RunRecord] = {}
    defects: list[Defect] = []
    for run in runs_of(out):
        try:
            row, found = _own_row(run)
        except OSError as error:
            row, found = None, [defect(run.name(run.row), None, error)]
        defects += found
        own |= {run.run_id: row} if row is not None else {}
    indexed, found = _indexed(out)
    defects += found
    rows = indexed | own
    for run_id, row in indexed.items():
        if run_id not in own:
            defects.append(
                defect(INDEX, None, f"run {run_id!r} has no readable runs/{run_id}/run.json; the index's row is used")
            )
        elif encode(own[run_id]) != encode(row):
            defects.append(defect(INDEX, None, f"the row of {run_id!r} differs from its run.json, which is used"))
    if own and (out / INDEX).exists():
        missing = [f"run {run_id!r} is missing from the index; its run.json is used" for run_id in own if run_id not in indexed]
        defects += [defect(INDEX, None, what) for what in missing]
    elif own:
        defects.append(defect(INDEX, None, "there is no index; the rows were read from runs/*/run.json"))
    return _of_one_device(tuple(rows[run_id] for run_id in sorted(rows)), defects)


def _own_row(run: RunFiles) -> tuple[RunRecord | None, list[Defect]]:
    """The row in a run's own folder; None without a defect: it has not ended."""
    row, defects = read_one(run.row, lambda content: record(content, RunRecord), run.name(run.row))
    if row is None or row.run_id == run.run_id:
        return row, defects
    return None, [defect(run.name(run.row), None, f"holds the row of run {row.run_id!r}, a copy: left out")]


def _indexed(out: Path) -> tuple[dict[str, RunRecord], list[Defect]]:
    """The index's rows; a run id that comes twice counts once."""
    records, defects = read_lines(out / INDEX, lambda line: record(line, RunRecord), INDEX)
    rows: dict[str, RunRecord] = {}
    if (out / INDEX).is_file() and (out / INDEX).stat().st_size == 0:
        defects.append(defect(INDEX, None, "is empty"))
    for row in records:
        if rows.setdefault(row.run_id, row) is not row:
            defects.append(defect(INDEX, None, f"run {row.run_id!r} stands there more than once; counted once"))
    return rows, defects


def _of_one_device(rows: tuple[RunRecord, ...], defects: list[Defect]) -> tuple[tuple[RunRecord, ...], list[Defect]]:
    """The rows of the device that most rows are from; a folder is one device's."""
    devices = Counter(row.device for row in rows)
    main = min(devices, key=lambda device: (-devices[device], device), default=None)
    defects += [
        defect(f"runs/{row.run_id}/run.json", None, f"device is {row.device!r} in a folder of {main!r}: left out")
        for row in rows
        if row.device != main
    ]
    return tuple(row for row in rows if row.device == main), defects


def index_content(out: Path) -> bytes:
    """``results.jsonl`` as it should be: the runs' own rows, and the rows of runs that have no folder here
    (the index is all that there is of them)."""
    rows = {run_id: row for run_id, row in indexed_rows(out).items() if not RunFiles(out, run_id).path.exists()}
    rows |= {row.run_id: row for row in finished_runs(out)}
    return b"".join(encode(rows[run_id]) + b"\n" for run_id in sorted(rows))


def write_index(out: Path) -> None:
    """Rebuild ``results.jsonl`` from the runs' own rows. One process at a time."""
    with locked(out / INDEX_LOCK):
        replace(out / INDEX, index_content(out))
