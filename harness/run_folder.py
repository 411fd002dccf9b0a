"""Where a run's files go, and the index over all runs of a results folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instrument.log import JsonlLog, replace
from instrument.records import RecordError, RunRecord, decode, encode

OF_THE_OLD_RUN = ("run.json", "forensics.json", "culprit.safetensors", "activations.jsonl", "hardware.jsonl")


class OutputError(Exception):
    """A results folder that cannot be written."""


class RunFolder:
    """``runs/<run_id>/`` and ``training_logs/run_<run_id>.jsonl`` of one run, started over."""

    def __init__(self, out: Path, run_id: str) -> None:
        require_writable(out)
        self.out = out
        self.path = out / "runs" / run_id
        try:
            for name in OF_THE_OLD_RUN:  # its terminal row and what explains it must not outlive its logs
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "snapshot", ignore_errors=True)
            self.steps = JsonlLog(out / "training_logs" / f"run_{run_id}.jsonl", fresh=True)
            self.evaluations = JsonlLog(self.path / "evaluations.jsonl", fresh=True)
            self.events = JsonlLog(self.path / "events.jsonl", fresh=True)
        except OSError as error:
            raise OutputError(f"cannot write {error.filename or out}: {error.strerror}; choose another folder with --out") \
                from error

    def finish(self, record: RunRecord) -> None:
        """Close the logs, then write the terminal row and the index."""
        self.close()
        write_terminal(self.out, record)

    def close(self) -> None:
        """Sync and close the logs."""
        for log in (self.steps, self.evaluations, self.events):
            log.close()


def write_terminal(out: Path, record: RunRecord) -> None:
    """A run's terminal row and the index with it."""
    replace(out / "runs" / record.run_id / "run.json", encode(record) + b"\n")
    write_index(out)


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
    """The terminal row of a run, or None when it has none (or one that cannot be read)."""
    try:
        return decode((out / "runs" / run_id / "run.json").read_bytes(), RunRecord)
    except (FileNotFoundError, RecordError):
        return None


def finished_runs(out: Path) -> list[RunRecord]:
    """Every readable terminal row of a results folder, by run id."""
    ids = sorted(path.parent.name for path in (out / "runs").glob("*/run.json"))
    return [record for run_id in ids if (record := finished_run(out, run_id)) is not None]


def write_index(out: Path) -> None:
    """Rebuild ``results.jsonl`` from the runs' own rows. One process at a time."""
    with _locked(out / ".index.lock"):
        replace(out / "results.jsonl", b"".join(encode(record) + b"\n" for record in finished_runs(out)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
