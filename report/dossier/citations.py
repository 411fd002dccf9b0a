"""Numbers for rows: a claim cites the rows it rests on, as a paper cites its sources."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from instrument.results.schemas import RunRecord
from report.tables.columns import case_order, series_order


class Citation(NamedTuple):
    """``text`` is ``12`` or a range, ``12–18``; ``anchor`` the first row's place in the page."""

    text: str
    anchor: str


def in_order(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Runs by case, configuration (in the registries' orders) and seed: the order of the run table."""
    runs = list(runs)
    cases = {case: at for at, case in enumerate(case_order(run.case for run in runs))}
    configs = {config: at for at, config in enumerate(series_order(run.dtype_config for run in runs))}
    return sorted(runs, key=lambda run: (cases[run.case], configs[run.dtype_config], run.seed, run.run_id))


class RowNumbers:
    """The number of every run in the run table, from 1."""

    def __init__(self, runs: Iterable[RunRecord]) -> None:
        self._number = {run.run_id: at for at, run in enumerate(in_order(runs), start=1)}

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._number

    def __getitem__(self, run_id: str) -> int:
        return self._number[run_id]

    def cite(self, run_ids: Iterable[str]) -> list[Citation]:
        """The rows as numbers in order, neighbours joined to ranges; ids that are no row are left out."""
        numbers = sorted({self._number[run_id] for run_id in run_ids if run_id in self._number})
        ranges: list[list[int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        return [Citation(str(low) if low == high else f"{low}–{high}", f"row-{low}") for low, high in ranges]
