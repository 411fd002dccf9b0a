"""``python -m harness repair DIR``: rebuild the index from the runs' own rows, cut torn lines, merge shards; and say so."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.exit_codes import BAD_DATA, OK
from harness.settings import SettingsError
from instrument.results.folder import OutputError
from instrument.results.layout import INDEX, RUNS, STEP_LOGS
from instrument.results.repair import Repair, repair_folder
from instrument.results.transfer import merge
from instrument.terminal import count, printable

MOST_NAMES = 5
COUNTS = {
    "torn": "cut short by a dead writer",
    "lost": "lost",
    "rejoined": "won back from lines run together",
    "repeated": "repeats dropped",
    "foreign": "not of this program's schema, left where they are",
}


def repair_command(options: argparse.Namespace) -> int:
    """Repair a results folder and say what was intact and what is lost: exit 4 when something is."""
    out: Path = options.folder
    for folder in (out, *options.merge):
        if not folder.is_dir() and (folder is not out or not options.merge):
            what = "is a file" if folder.exists() else "does not exist"
            raise SettingsError(f"{folder} {what}; give a results folder, such as results/nvidia-h200")
    merged = Repair(str(out))
    try:
        merge(out, options.merge, merged)
        if not any((out / name).exists() for name in (RUNS, STEP_LOGS, INDEX)):
            names = f"{RUNS}/ nor {STEP_LOGS}/ nor {INDEX}"
            raise SettingsError(f"{out} holds neither {names}; give a results folder, such as results/nvidia-h200")
        done = repair_folder(out)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}; lines that were intact still are"
        raise OutputError(f"cannot repair {out}: {why}") from error
    done.merged, done.in_use = merged.merged, sorted({*merged.in_use, *done.in_use})
    done.files = merged.files + done.files
    if options.json:
        print(json.dumps(done.as_json()))
    else:
        print_repair(done)
    return BAD_DATA if done.is_damaged else OK


def print_repair(done: Repair) -> None:
    """What was found and done, on standard error: a line for every file that has something, and the sum."""
    for state in done.files:
        counts = [f"{getattr(state, name):,} {word}" for name, word in COUNTS.items() if getattr(state, name)]
        found = [*([f"{count(state.intact, 'line')} intact"] if counts else []), *counts, *state.notes]
        if found:
            _say(f"  {state.file}: {'; '.join(found)}")
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)
