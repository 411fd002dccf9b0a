"""Speed relative to fp32_true over several cases, seed by seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from instrument.results.schemas import RunRecord
from report.tables.columns import REFERENCE, is_control, series_order
from report.tables.fairness import unfair

Scores = dict[str, dict[str, list[float]]]
"""Group -> configuration -> log speed relative to fp32_true, one value a seed, averaged over cases."""


def group_scores(runs: Iterable[RunRecord], group_of: Callable[[RunRecord], str]) -> Scores:
    """A configuration counts in a group with every (case, seed) that fp32_true has there, or not at all:
    a mean over other cases would rank the cases. Controls are left out: they explain deaths."""
    runs = list(runs)
    by_key = {(run.case, run.dtype_config, run.seed): run for run in runs}
    cells: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for run in runs:
        if run.dtype_config == REFERENCE:
            cells[group_of(run)].add((run.case, run.seed))
    configs = [config for config in series_order({run.dtype_config for run in runs}) if not is_control(config)]
    return {
        group: {config: values for config in configs if (values := _by_seed(by_key, sorted(cells[group]), config)) is not None}
        for group in cells
    }


def _by_seed(by_key: dict, cells: list[tuple[str, int]], config: str) -> list[float] | None:
    logs: dict[int, list[float]] = defaultdict(list)
    for case, seed in cells:
        run, reference = by_key.get((case, config, seed)), by_key[case, REFERENCE, seed]
        if run is None or unfair(run, reference) is not None:
            return None
        logs[seed].append(math.log(run.samples_per_s / reference.samples_per_s))
    return [float(np.mean(logs[seed])) for seed in sorted(logs)] or None
