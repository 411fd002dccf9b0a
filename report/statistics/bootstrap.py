"""Block bootstrap within one run, where neighbouring steps are not independent. Never across seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from report.statistics.interval import CONFIDENCE, NOTHING, Interval

DRAWS = 1_000
FEWEST_BLOCKS = 5


def block_bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    block: int | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic of a series, from moving blocks of ``block`` steps.

    ``statistic`` maps an array [draws, n] to [draws] along its last axis. The default block is
    n^(1/3) rounded up, at least 2 (Kuensch 1989's rate). Always the same draws: a report built
    twice is the same. Fewer than five blocks give the value without an interval.
    """
    series = np.asarray(values, dtype=np.float64)
    series = series[np.isfinite(series)]
    n = series.size
    if n == 0:
        return NOTHING
    value = float(statistic(series[None, :])[0])
    block = block or max(2, int(np.ceil(n ** (1 / 3))))
    if n < FEWEST_BLOCKS * block:
        return Interval(value, np.nan, np.nan, n)
    starts = np.random.default_rng(0).integers(0, n - block + 1, size=(draws, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, :n]
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(series[index]), [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


def coefficient_of_variation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over mean along the last axis."""
    return values.std(axis=-1, ddof=1) / values.mean(axis=-1)
