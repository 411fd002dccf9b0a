"""The opening words of every caption: which data these are."""

from __future__ import annotations

from collections.abc import Sequence

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.words import count, shortened


def data_words(folder: Folder, runs: Sequence[RunRecord]) -> str:
    """Device, runs, seeds, preset, data and weights in one sentence."""
    if not runs:
        return f"{folder.device}: no runs."
    seeds = sorted({run.seed for run in runs})
    facts = [
        f"{shortened(sorted({run.preset for run in runs}))} preset",
        f"data {shortened(sorted({run.data_source for run in runs}))}",
        f"weights {shortened(sorted({run.weights_source for run in runs}))}",
    ]
    return (
        f"{folder.device}, {count(len(runs), 'run')}, {count(len(seeds), 'seed')} "
        f"({shortened(map(str, seeds), 5)}), {', '.join(facts)}."
    )
