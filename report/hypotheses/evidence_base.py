"""The runs that hypotheses are judged on, looked up by case, configuration and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.statistics.interval import NOTHING, Interval, mean_interval
from report.tables.columns import case_order
from report.tables.eligible import eligible
from report.tables.fairness import unfair
from report.tables.judgement import Judgements, judge_runs
from report.tables.selection import Selection, select

BySeed = dict[int, RunRecord]


@dataclass(frozen=True)
class EvidenceBase:
    """One selection of a folder's runs."""

    folder: Folder
    selection: Selection

    @classmethod
    def of(cls, folder: Folder, keep: Callable[[RunRecord], bool] = lambda run: True) -> EvidenceBase:
        """The main variant of every case among the runs that ``keep`` takes."""
        return cls(folder, select(folder, keep))

    @cached_property
    def judgements(self) -> Judgements:
        """Every run's state."""
        return judge_runs(self.folder, self.selection)

    @cached_property
    def _timed(self) -> frozenset[str]:
        return frozenset(run.run_id for run in eligible(self.folder, self.selection)[0])

    @property
    def cases(self) -> dict[str, RunRecord]:
        """Case ids in the registry's order, each with one of its runs to read its settings from."""
        one = {run.case: run for run in self.selection.runs}
        return {case: one[case] for case in case_order(one)}

    def runs(self, case: str, config: str) -> BySeed:
        """The runs of a cell by seed."""
        return {run.seed: run for run in self.selection.runs if (run.case, run.dtype_config) == (case, config)}

    def timed(self, case: str, config: str) -> BySeed:
        """The runs of a cell that may enter a figure of speed, by seed."""
        return {seed: run for seed, run in self.runs(case, config).items() if run.run_id in self._timed}

    def state(self, run: RunRecord) -> str:
        """A run's judged state."""
        return self.judgements.by_id[run.run_id].state


def log_ratios(over: BySeed, under: BySeed, value: Callable[[RunRecord], float | None]) -> dict[int, float]:
    """log(over / under) for every seed that both have and whose rows may be compared."""
    found = {}
    for seed in sorted(over.keys() & under.keys()):
        a, b = value(over[seed]), value(under[seed])
        if a and b and unfair(over[seed], under[seed]) is None:
            found[seed] = float(np.log(a / b))
    return found


def difference(first: dict[int, float], second: dict[int, float]) -> Interval:
    """t-interval of first - second over the seeds that both have."""
    seeds = sorted(first.keys() & second.keys())
    return mean_interval([first[seed] - second[seed] for seed in seeds]) if seeds else NOTHING


def ids(*cells: BySeed) -> tuple[str, ...]:
    """Run ids of some cells."""
    return tuple(run.run_id for cell in cells for run in cell.values())
