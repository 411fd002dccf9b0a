"""Where a run's files go, and the index over all runs of a results folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from instrument.results.files import locked, plain_inside, remove, replace, require_there
from instrument.results.log import JsonlLog
from instrument.results.schemas import UNREADABLE, RunRecord, decode, encode, is_safe, require_safe

INDEX, INDEX_LOCK = "results.jsonl", ".index.lock"
OF_THE_OLD_RUN = ("run.json", "forensics.json", "culprit.safetensors", "activations.jsonl", "hardware.jsonl")


class OutputError(Exception):
    """A results folder that cannot be written."""


class RunFolder:
    """``runs/<run_id>/`` and ``training_logs/run_<run_id>.jsonl`` of one run, started over."""

    def __init__(self, out: Path, run_id: str) -> None:
        require_safe(run_id)
        require_writable(out)
        require_no_links(out, run_id)
        self.out = out
        self.path = out / "runs" / run_id
        try:
            for name in OF_THE_OLD_RUN:  # its terminal row and what explains it must not outlive its logs
                remove(self.path / name)
            shutil.rmtree(self.path / "snapshot", ignore_errors=True)
            self.steps = JsonlLog(out / "training_logs" / f"run_{run_id}.jsonl", fresh=True)
            self.evaluations = JsonlLog(self.path / "evaluations.jsonl", fresh=True)
            self.events = JsonlLog(self.path / "events.jsonl", fresh=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {error.filename or out}: {error.strerror}; choose another folder with --out"
            ) from error

    def finish(self, record: RunRecord) -> None:
        """Close the logs, then write the terminal row and the index; not into a folder that has gone away meanwhile."""
        self.close()
        require_there(self.path)
        write_terminal(self.out, record)

    def close(self) -> None:
        """Sync and close the logs."""
        for log in (self.steps, self.evaluations, self.events):
            log.close()


def write_terminal(out: Path, record: RunRecord) -> None:
    """A run's terminal row and the index with it."""
    replace(out / "runs" / record.run_id / "run.json", encode(record) + b"\n")
    write_index(out)


def require_no_links(out: Path, run_id: str) -> None:
    """Raise `OutputError` where a link would lead a run's files out of the results folder."""
    for place in (out / "training_logs", out / "traces", out / "runs", out / "runs" / run_id):
        if place.is_symlink():
            raise OutputError(
                f"{place} is a link, and links in a results folder are not followed; put the whole folder elsewhere with --out"
            )


def require_writable(out: Path) -> None:
    """Make the folder; raises `OutputError` with the reason when it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error


def write_machine(out: Path, facts: dict[str, object]) -> None:
    """``machine.json``: the machine that the folder's runs were made on, written once."""
    if not (out / "machine.json").exists():
        replace(out / "machine.json", json.dumps(facts, indent=1).encode() + b"\n")


def finished_run(out: Path, run_id: str) -> RunRecord | None:
    """The terminal row of a run, or None when it has none of its own that can be read."""
    path = out / "runs" / run_id / "run.json"
    if not is_safe(run_id) or not plain_inside(out, path):
        return None
    try:
        record = decode(path.read_bytes(), RunRecord)
    except (FileNotFoundError, *UNREADABLE):
        return None
    return record if record.run_id == run_id else None


def finished_runs(out: Path) -> list[RunRecord]:
    """Every readable terminal row of a results folder, by run id."""
    ids = sorted(path.parent.name for path in (out / "runs").glob("*/run.json"))
    return [record for run_id in ids if (record := finished_run(out, run_id)) is not None]


def indexed_rows(out: Path) -> dict[str, RunRecord]:
    """The readable rows that the index holds now, by run id; of one that comes twice the first."""
    rows: dict[str, RunRecord] = {}
    path = out / INDEX
    for line in path.read_bytes().splitlines() if plain_inside(out, path) else ():
        try:
            record = decode(line, RunRecord)
        except UNREADABLE:
            continue
        rows.setdefault(record.run_id, record)
    return rows


def index_content(out: Path) -> bytes:
    """``results.jsonl`` as it should be: the runs' own rows, and the rows of runs that have no folder here
    (the index is all that there is of them)."""
    rows = {run_id: row for run_id, row in indexed_rows(out).items() if not (out / "runs" / run_id).exists()}
    rows |= {row.run_id: row for row in finished_runs(out)}
    return b"".join(encode(rows[run_id]) + b"\n" for run_id in sorted(rows))


def write_index(out: Path) -> None:
    """Rebuild ``results.jsonl`` from the runs' own rows. One process at a time."""
    with locked(out / INDEX_LOCK):
        replace(out / INDEX, index_content(out))
