"""``python -m harness repair DIR``: rebuild the index from the runs' own rows, cut torn lines, merge shards.

What `repair` says to a person: a line for every file that has something, and the sum.

Bring the finished runs of other results folders (shards of one matrix) into one.

A run is copied when its row is readable and the target has no row of it; its ``run.json`` comes last, so
that a merge that is interrupted leaves an unfinished run, which the next merge brings again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.exit_codes import BAD_DATA, OK
from harness.settings import SettingsError
from instrument.results import files
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import finished_run, finished_runs
from instrument.results.repair import Repair
from instrument.results.schemas import RunRecord, encode
from instrument.results.states import FileState
from instrument.results.transfer import MACHINE, files_of
from instrument.terminal import count


def repair_command(options: argparse.Namespace) -> int:
    """Repair a results folder and say what was intact and what is lost: exit 4 when something is."""
    from harness.settings import SettingsError
    from instrument.results.folder import OutputError
    from instrument.results.repair import Repair, repair_folder

    for folder in (options.folder, *options.merge):
        if not folder.is_dir() and (folder is not options.folder or not options.merge):
            what = "is a file" if folder.exists() else "does not exist"
            raise SettingsError(f"{folder} {what}; give a results folder, such as results/nvidia-h200")
    merged = Repair(str(options.folder))
    try:
        merge(options.folder, options.merge, merged)
        if not any((options.folder / name).exists() for name in ("runs", "training_logs", "results.jsonl")):
            raise SettingsError(
                f"{options.folder} holds neither runs/ nor training_logs/ nor results.jsonl; give a results "
                "folder, such as results/nvidia-h200"
            )
        done = repair_folder(options.folder)
    except OSError as error:
        raise OutputError(
            f"cannot repair {options.folder}: {error.filename}: {error.strerror}; lines that were intact still are"
        ) from error
    done.merged, done.in_use = merged.merged, sorted({*merged.in_use, *done.in_use})
    done.files = merged.files + done.files
    if options.json:
        json.dump(done.as_json(), sys.stdout)
        sys.stdout.write("\n")
    else:
        print_repair(done)
    return BAD_DATA if done.is_damaged else OK


MOST_NAMES = 5
COUNTS = {
    "torn": "cut short by a dead writer",
    "lost": "lost",
    "rejoined": "won back from lines run together",
    "repeated": "repeats dropped",
    "foreign": "not of this program's schema, left where they are",
}


def print_repair(done: Repair) -> None:
    """The report on standard error."""
    for state in done.files:
        if words := _words(state):
            _say(f"  {state.file}: {words}")
    if done.merged:
        _say(f"merged {count(len(done.merged), 'run')}: {_some(done.merged)}")
    if done.in_use:
        _say(f"left alone, since a living process executes them: {_some(done.in_use)}")
    intact, lost = sum(state.intact for state in done.files), sum(state.lost for state in done.files)
    if done.unfinished:
        left = count(len(done.unfinished), "run")
        _say(f"{left} without a result, which `case` or `matrix` runs again: {_some(done.unfinished)}")
    changed = f"{count(len(done.changed), 'file')} changed" if done.changed else "nothing to mend"
    _say(f"{done.folder}: {count(done.runs, 'finished run')}, {count(intact, 'line')} intact, {lost:,} lost; {changed}")


def _words(state: FileState) -> str:
    counts = [f"{getattr(state, name):,} {word}" for name, word in COUNTS.items() if getattr(state, name)]
    return "; ".join([*([f"{count(state.intact, 'line')} intact"] if counts else []), *counts, *state.notes])


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _say(line: str) -> None:
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


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
