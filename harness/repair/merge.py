"""Bring the finished runs of other results folders (shards of one matrix) into one.

A run is copied when its row is readable and the target has no row of it; its ``run.json`` comes last, so
that a merge that is interrupted leaves an unfinished run, which the next merge brings again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from harness.claims import RunClaimed, claim
from harness.repair.folder import Repair
from harness.repair.states import FileState
from harness.run_folder import finished_run, finished_runs
from harness.settings import SettingsError
from instrument import files
from instrument.count import count
from instrument.records import RunRecord, encode

MACHINE = "machine.json"


def merge(out: Path, others: list[Path], done: Repair) -> None:
    """Copy into ``out`` what it lacks. Raises `SettingsError` for a folder of another device, OSError where
    ``out`` cannot be written; ``done.merged`` gets the ids of the copied runs."""
    for other in others:
        _require_same_device(out, other)
    for other in others:
        for row in finished_runs(other):
            ours = finished_run(out, row.run_id)
            if ours is None:
                try:
                    _copy_run(other, out, row)
                    done.merged.append(row.run_id)
                except RunClaimed:
                    done.in_use.append(row.run_id)
            elif encode(ours) != encode(row):
                done.files.append(
                    FileState(
                        f"runs/{row.run_id}/run.json",
                        intact=1,
                        notes=[f"{ours.status}; {other} has another row of this run ({row.status}): left there"],
                    )
                )
        left = [path.name for path in (other / "runs").glob("*/") if finished_run(other, path.name) is None]
        if left:
            notes = [f"{count(len(left), 'run')} without a readable row: left there"]
            done.files.append(FileState(f"{other}/runs", notes=notes))
        if files.plain_inside(other, other / MACHINE) and not (out / MACHINE).exists():
            files.copy(other / MACHINE, out / MACHINE)


def _require_same_device(out: Path, other: Path) -> None:
    if out.resolve() == other.resolve():
        raise SettingsError(f"--merge {other}: is the folder to merge into")
    ours, theirs = ({row.device for row in finished_runs(folder)} for folder in (out, other))
    if not theirs:
        raise SettingsError(f"--merge {other}: no finished run in it; give a results folder, which holds runs/")
    if ours and theirs - ours:
        raise SettingsError(
            f"--merge {other}: its runs are of {', '.join(sorted(theirs))} and those of {out} of "
            f"{', '.join(sorted(ours))}; a results folder holds one device"
        )


def _copy_run(other: Path, out: Path, row: RunRecord) -> None:
    own = claim(out, row.run_id)
    try:
        for source in files_of(other, row.run_id):
            files.copy(source, out / source.relative_to(other))
        files.copy(other / "runs" / row.run_id / "run.json", out / "runs" / row.run_id / "run.json")
    finally:
        own.release()


def files_of(other: Path, run_id: str) -> Iterator[Path]:
    """A run's plain files but its row: no links, nothing hidden."""
    log = other / "training_logs" / f"run_{run_id}.jsonl"
    traces = [other / "traces" / f"{run_id}.json.gz", *(other / "traces").glob(f"{run_id}-step*.json.gz")]
    inside = []
    for folder, folders, names in os.walk(other / "runs" / run_id):  # follows no links
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in (log, *traces, *sorted(inside)):
        if path != other / "runs" / run_id / "run.json" and files.plain_inside(other, path):
            yield path
