"""Which statements the seeds show, at a level that holds for 3 seeds as for 30: exact tests, and how they combine.

A `Test` is of one statement against its opposite. Differences between paired runs: Student's t against a margin. Outcomes that
happen or not: the binomial law, and Fisher's for two groups. Statements combine without independence: all of them by the
largest p-value, any of k by k times the smallest, each of a family by Holm's rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

LEVEL = 0.025
"""A statement is shown at this one-sided level: then the two-sided 95 % interval excludes the margin too."""
FAMILY_LEVEL = 0.04
"""The chance that any statement of a family is shown and false; below 5 % to leave room for differences that are not normal."""
POWER = 0.8
FEWEST_SEEDS = 3
"""Below this many paired seeds a t-test shows nothing: with two, its level rests on two normal numbers."""
MOST_SEEDS = 1_000
LARGEST = 1e150
"""Values beyond it, whose squares no float holds, show nothing."""
RARE = 0.10
"""What happens with fewer than 1 seed in 10 is no property of a configuration."""


@dataclass(frozen=True)
class Test:
    """``p``: the chance of such data, or clearer ones, where the statement is false. ``seeds``: level -> how many seeds would
    show it with a power of 80 %, were the effect as measured; None where it points the other way or is not known."""

    __test__ = False  # no test for pytest

    p: float
    seeds: Callable[[float], int | None] = lambda level: None

    @property
    def shown(self) -> bool:
        """Whether the data show the statement."""
        return self.p <= LEVEL

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would show it."""
        return self.seeds(LEVEL)


UNTESTED = Test(1.0)


def all_of(tests: Iterable[Test]) -> Test:
    """The statement that every one of some statements holds; nothing is shown of none."""
    tests = [*tests]
    if not tests:
        return UNTESTED

    def seeds(level: float) -> int | None:
        needed = [test.seeds(level) for test in tests]
        return None if None in needed else max(n for n in needed if n is not None)

    return Test(max(test.p for test in tests), seeds)


def any_of(tests: Iterable[Test]) -> Test:
    """The statement that at least one of some statements holds (Bonferroni)."""
    tests = [*tests]
    if not tests:
        return UNTESTED

    def seeds(level: float) -> int | None:
        return min((n for test in tests if (n := test.seeds(level / len(tests))) is not None), default=None)

    return Test(min(1.0, len(tests) * min(test.p for test in tests)), seeds)


def shown_of_family(tests: dict[str, Test]) -> set[str]:
    """Which statements of a family are shown, such that the chance of any false one is at most 4 % (Holm 1979). Each is at
    the same time within the level of one statement, so that its own 95 % interval agrees."""
    shown: set[str] = set()
    for rank, (name, test) in enumerate(sorted(tests.items(), key=lambda item: item[1].p)):
        if test.p > min(LEVEL, FAMILY_LEVEL / (len(tests) - rank)):
            break
        shown.add(name)
    return shown


def above(values: Iterable[float], bound: float, resolution: float = 0.0) -> Test:
    """The mean of paired differences lies above ``bound`` (t). ``resolution``: the standard deviation that rounding alone
    gives, below which equal values are no evidence of precision (0: none)."""
    found = [float(value) for value in values]
    n = len(found)
    if n < 2 or not all(abs(value) < LARGEST for value in found):  # also of what is no number
        return UNTESTED
    mean = math.fsum(found) / n
    spread = max(math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (n - 1)), resolution)
    effect = mean - bound

    def seeds(level: float) -> int | None:
        return _t_seeds(effect, spread, level)

    if n < FEWEST_SEEDS:
        return Test(1.0, seeds)
    if spread == 0.0:
        return Test(0.0 if effect > 0 else 1.0, seeds)
    return Test(float(special.stdtr(n - 1, -effect * math.sqrt(n) / spread)), seeds)


def above_unpaired(values: Iterable[float], others: Iterable[float], bound: float) -> Test:
    """The mean of ``values`` exceeds that of ``others``, of other seeds, by more than ``bound`` (Welch's t)."""
    groups = [[float(value) for value in group] for group in (values, others)]
    if min(len(group) for group in groups) < FEWEST_SEEDS:
        return UNTESTED
    means = [math.fsum(group) / len(group) for group in groups]
    errors = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    effect, error = means[0] - means[1] - bound, math.sqrt(sum(errors))
    if error == 0.0:
        return Test(0.0 if effect > 0 else 1.0)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(group) - 1) for e, group in zip(errors, groups, strict=True))
    return Test(float(special.stdtr(freedom, -effect / error)))


def below(values: Iterable[float], bound: float, resolution: float = 0.0) -> Test:
    """The mean of paired differences lies below ``bound`` (t)."""
    return above([-value for value in values], -bound, resolution)


def _t_seeds(effect: float, spread: float, level: float) -> int | None:
    if effect <= 0:
        return None
    enough = np.flatnonzero(effect >= spread * _detectable(level))
    return int(enough[0]) + FEWEST_SEEDS if enough.size else None


@lru_cache
def _detectable(level: float) -> np.ndarray:
    """The effect over its standard deviation that 3, 4, ... seeds show at a level with a power of 80 %."""
    n = np.arange(FEWEST_SEEDS, MOST_SEEDS + 1)
    return (special.stdtrit(n - 1, 1 - level) + special.stdtrit(n - 1, POWER)) / np.sqrt(n)


def rate_above(hits: int, n: int, bound: float = RARE) -> Test:
    """An outcome happens at a rate above ``bound``: exact, binomial."""
    return Test(_at_least(hits, n, bound), lambda level: _rate_seeds(hits / n, bound, level) if n else None)


def rate_below(hits: int, n: int, bound: float = RARE) -> Test:
    """An outcome happens at a rate below ``bound``: exact, binomial."""
    return rate_above(n - hits, n, 1 - bound)


@lru_cache(4096)
def _rate_seeds(rate: float, bound: float, level: float) -> int | None:
    if rate <= bound:
        return None
    return next((m for m in range(1, MOST_SEEDS + 1) if _reaches(m, rate, bound, level)), None)


def _at_least(hits: int, n: int, rate: float) -> float:
    """The chance of ``hits`` or more of n."""
    return 1.0 if hits <= 0 else float(special.betainc(hits, n - hits + 1, rate))


def _reaches(n: int, rate: float, bound: float, level: float) -> bool:
    """Whether n trials show a rate above the bound with enough power."""
    fewest = next((k for k in range(n + 1) if _at_least(k, n, bound) <= level), None)
    return fewest is not None and _at_least(fewest, n, rate) >= POWER


def more_often(hits: int, n: int, other_hits: int, other_n: int) -> Test:
    """An outcome happens more often in the first group than in the second: Fisher's exact test."""

    def seeds(level: float) -> int | None:
        if not n or not other_n or hits * other_n <= other_hits * n:
            return None
        return _group_seeds(hits / n, other_hits / other_n, level)

    return Test(_fisher(hits, n, other_hits, other_n) if n and other_n else 1.0, seeds)


@lru_cache(4096)
def _group_seeds(rate: float, other: float, level: float) -> int | None:
    sizes = range(1, MOST_SEEDS // 4)
    return next((m for m in sizes if _fisher(round(rate * m), m, round(other * m), m) <= level), None)


def _fisher(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """The chance that, of all hits, so many or more fall into the first group."""
    total = hits + other_hits
    most = min(n, total)
    ways = sum(math.comb(n, k) * math.comb(other_n, total - k) for k in range(hits, most + 1) if total - k <= other_n)
    return ways / math.comb(n + other_n, total)
