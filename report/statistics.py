"""Uncertainty, in closed form where there is one: intervals, ranks with ties, spikes. Each function names its method.

Across seeds: Student's t, on differences or on logarithms of ratios. Seeds are the replicates (3 to 5 of them), so
t-intervals on paired values: at n = 5 a percentile bootstrap covers 86 % instead of 95 %. One seed has a value and no
interval. Within one run, where neighbouring steps are not independent: a block bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats would cost half a second at every start

CONFIDENCE = 0.95
DRAWS = 1_000
FEWEST_BLOCKS = 5
FEWEST_FOR_TAU = 5
FIELLER_VARIANCE = 0.437
"""Variance of atanh(tau) is 0.437 / (n - 4): Fieller, Hartley & Pearson, Biometrika 44 (1957)."""
WINDOW_STEPS = 50
FEWEST_STEPS = 10
SPIKE_FACTOR = 5.0


@dataclass(frozen=True)
class Interval:
    """A value with its interval; ``low`` and ``high`` are nan when n is below 2."""

    value: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def negated(self) -> Interval:
        """The interval of minus the value."""
        return Interval(-self.value, -self.high, -self.low, self.n)

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above ``bound``."""
        return self.known and self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below ``bound``."""
        return self.known and self.high < bound


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and t-interval of independent values; apply it to paired differences for a comparison.

    Raises ValueError on a non-finite value: a diverged run has no value."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite values, and {int((~np.isfinite(array)).sum())} of {array.size} are not")
    if array.size == 0:
        return NOTHING
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(special.stdtrit(array.size - 1, (1 + confidence) / 2) * array.std(ddof=1) / math.sqrt(array.size))
    return Interval(mean, mean - half, mean + half, array.size)


def exponential(logs: Interval) -> Interval:
    """An interval of logarithms as one of ratios."""
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(value)) for value in (logs.value, logs.low, logs.high)), logs.n)


def share_interval(hits: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """A share of n independent trials with its exact (Clopper-Pearson) interval."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no share")
    if n == 0:
        return NOTHING
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1 - tail))
    return Interval(hits / n, low, high, n)


def block_bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    block: int | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic of a series, from moving blocks of ``block`` steps.

    ``statistic`` maps an array [draws, n] to [draws] along its last axis. The default block is n^(1/3) rounded up, at least 2
    (Kuensch 1989's rate). Always the same draws: a report built twice is the same. Fewer than five blocks give the value
    without an interval."""
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


@dataclass(frozen=True)
class Ranked:
    """One entry of a ranking: ``rank`` counts from 1; equal ``tie_group`` means not separated from the group's first;
    ``with_leader``: not separated from the first of all."""

    name: str
    rank: int
    tie_group: int
    with_leader: bool


def rank_with_ties(scores: dict[str, Sequence[float]]) -> list[Ranked]:
    """Names by mean score, highest first. ``scores`` holds one value a seed, the same seeds for all.

    Two are separated when the t-interval of their paired differences excludes 0 (95 % for all comparisons of a leader together:
    Bonferroni), so one seed separates nothing. Each is compared with the first of its group, and the first that is separated
    from it opens the next group: ties do not chain."""
    counts = {len(values) for values in scores.values()}
    if len(counts) > 1:
        raise ValueError(f"a ranking needs the same seeds for all, and there are {sorted(counts)} of them")
    order = sorted(scores, key=lambda name: (-float(np.mean(scores[name])), name))
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(order) - 1)

    def separated(first: str, second: str) -> bool:
        return mean_interval(np.subtract(scores[first], scores[second]), confidence).above(0.0)

    found: list[Ranked] = []
    group, leader = 0, order[0] if order else ""
    for rank, name in enumerate(order, start=1):
        if separated(leader, name):
            group, leader = group + 1, name
        found.append(Ranked(name, rank, group, not separated(order[0], name)))
    return found


def kendall_tau(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float] | None:
    """Kendall's tau-b of two score lists with its interval, or None below five pairs.

    The interval is Fieller's, on atanh(tau), with tau at +-1 moved by half a pair so that it has one. It treats the pairs as a
    sample; with few of them it is wide, and that is the truth."""
    n = len(first)
    if n != len(second):
        raise ValueError(f"{n} and {len(second)} scores are no pairs")
    if n < FEWEST_FOR_TAU:
        return None
    from scipy.stats import kendalltau  # half a second, and most folders have too few configurations

    tau = float(kendalltau(first, second).statistic)
    if math.isnan(tau):  # every score of a side is the same
        return None
    limit = 1 - 2 / (n * (n - 1))
    half = special.ndtri((1 + confidence) / 2) * math.sqrt(FIELLER_VARIANCE / (n - 4))
    middle = math.atanh(max(-limit, min(limit, tau)))
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    return tau, min(low, tau), max(high, tau)


def rolling_median(values: np.ndarray, window: int = WINDOW_STEPS, fewest: int = 1) -> np.ndarray:
    """Median of the last ``window`` values up to and with each one; nan while fewer than ``fewest`` of them are finite."""
    finite = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return finite.rolling(window, min_periods=fewest).median().to_numpy()


def spikes(values: np.ndarray) -> np.ndarray:
    """Which values exceed 5 times the median of the 50 before them (10 at least, itself left out).

    Non-finite values are no spikes: they are counted on their own."""
    before = np.full(len(values), np.nan)
    before[1:] = rolling_median(np.asarray(values, dtype=np.float64), fewest=FEWEST_STEPS)[:-1]
    with np.errstate(invalid="ignore"):
        return np.isfinite(values) & (values > SPIKE_FACTOR * before)
