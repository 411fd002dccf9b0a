"""Values of a configuration paired with the reference's, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from instrument.results.schemas import RunRecord
from report.statistics.interval import NOTHING, Interval, ratio_interval
from report.tables.fairness import unfair


def fair_pairs(runs: Iterable[RunRecord], others: Iterable[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    """Runs of two configurations of one case with equal seeds that may be compared."""
    by_seed = {other.seed: other for other in others}
    return [
        (run, by_seed[run.seed])
        for run in sorted(runs, key=lambda run: run.seed)
        if run.seed in by_seed and unfair(run, by_seed[run.seed]) is None
    ]


def paired_ratio(pairs: list[tuple[RunRecord, RunRecord]], value: Callable[[RunRecord], float | None]) -> Interval:
    """Geometric mean of the pairs' ratios with its t-interval; pairs without a value are left out."""
    known = [
        (a, b) for run, other in pairs if (a := value(run)) is not None and (b := value(other)) is not None and a > 0 and b > 0
    ]
    return ratio_interval([a for a, _ in known], [b for _, b in known]) if known else NOTHING


def pooled_rate(rates: list[float]) -> float:
    """The rate of runs that did the same work each: total over total, the harmonic mean."""
    return len(rates) / sum(1 / rate for rate in rates)
