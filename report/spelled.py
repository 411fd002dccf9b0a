"""How a command line names the case of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from bench_cases import CASES
from instrument.results.schemas import RunRecord
from report.plots.text import clean

LONGEST_WORD = 400


def spelled(run: RunRecord) -> list[str] | None:
    """The words after ``harness case``: the id of a case of the project; ``path/to/file.py:NAME`` or ``--model`` and
    ``--task`` of one from outside. None where the row does not say them, or not in words that fit a line."""
    words = run.flags.get("case_spelled")
    if words is None:
        return [run.case] if run.case in CASES else None
    fine = isinstance(words, list) and all(isinstance(word, str) and word == clean(word, LONGEST_WORD) for word in words)
    return words if fine and words else None


def cases_option(runs: Iterable[RunRecord]) -> str | None:
    """The options that name the runs' cases to ``harness matrix``, quoted; a matrix takes one ``--model`` or any number of
    ``--cases``, so what has no room in it is left to the next. None where no case can be named."""
    named = [words for run in runs if (words := spelled(run))]
    ids = [words[0] for words in named if len(words) == 1]
    return shlex.join(["--cases", *ids]) if ids else shlex.join(named[0]) if named else None
