"""What `repair` says to a person: a line for every file that has something, and the sum."""

from __future__ import annotations

import sys

from harness.repair.folder import Repair
from harness.repair.states import FileState
from instrument.count import count

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
