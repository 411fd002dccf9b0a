"""Ranks, ties that the seeds do not separate, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import special

from report.statistics.interval import CONFIDENCE, mean_interval

FEWEST_FOR_TAU = 5
FIELLER_VARIANCE = 0.437
"""Variance of atanh(tau) is 0.437 / (n - 4): Fieller, Hartley & Pearson, Biometrika 44 (1957)."""


@dataclass(frozen=True)
class Ranked:
    """One entry of a ranking: ``rank`` counts from 1; equal ``tie_group`` means not separated."""

    name: str
    rank: int
    tie_group: int


def rank_with_ties(scores: dict[str, Sequence[float]]) -> list[Ranked]:
    """Names by mean score, highest first. ``scores`` holds one value a seed, the same seeds for all.

    Two neighbours tie unless the t-interval of their paired differences excludes 0, so one seed
    separates nothing. Ties chain: a group ends where two neighbours are separated.
    """
    counts = {len(values) for values in scores.values()}
    if len(counts) > 1:
        raise ValueError(f"a ranking needs the same seeds for all, and there are {sorted(counts)} of them")
    order = sorted(scores, key=lambda name: (-float(np.mean(scores[name])), name))
    groups = [0] if order else []
    for first, second in pairwise(order):
        differences = np.subtract(scores[first], scores[second])
        groups.append(groups[-1] + mean_interval(differences).above(0.0))
    return [Ranked(name, rank, group) for rank, (name, group) in enumerate(zip(order, groups, strict=True), start=1)]


def kendall_tau(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float] | None:
    """Kendall's tau-b of two score lists with its interval, or None below five pairs.

    The interval is Fieller's, on atanh(tau), with tau at +-1 moved by half a pair so that it has
    one. It treats the pairs as a sample; with few of them it is wide, and that is the truth.
    """
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
