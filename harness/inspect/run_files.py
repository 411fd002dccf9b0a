"""What a run left on disk, validated. Every broken file is `RunUnreadable`, with its path and line."""

from __future__ import annotations

from pathlib import Path

from harness.inspect.locate import FoundRun, RunUnreadable
from instrument.forensics_record import ForensicsRecord
from instrument.log import read
from instrument.records import AnyRecord, RecordError, RunRecord, decode


def run_record(run: FoundRun) -> RunRecord | None:
    """The run's terminal row; None when it has not ended."""
    return _one(run.path / "run.json", RunRecord)


def failure_of(run: FoundRun, record: RunRecord | None) -> ForensicsRecord | None:
    """What its replay found; None where there was none, and for what an earlier run of the same id left behind."""
    found = _one(run.path / "forensics.json", ForensicsRecord)
    if found is None or record is None or record.status != "diverged" or found.first_nonfinite.step != record.divergence_step:
        return None
    return found


def records(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """The lines of one of a run's logs; none where there is no such file."""
    try:
        return list(read(path, kind))
    except FileNotFoundError:
        return []
    except RecordError as error:
        raise RunUnreadable(str(error)) from error


def _one(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    if path.is_symlink():
        raise RunUnreadable(f"{path} is a link, and links in a results folder are not followed")
    try:
        return decode(path.read_bytes(), kind)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RunUnreadable(f"{path}: {error}") from error


def module_rows(run: FoundRun) -> list:
    """The run's module magnitudes, in windows of steps."""
    from instrument.watch.module_log import ModuleRecord

    return records(run.path / "activations.jsonl", ModuleRecord)
