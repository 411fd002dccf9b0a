"""One measured figure: its repetitions summarised, its target, and whether that is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev


@dataclass(frozen=True)
class Figure:
    """``n`` repetitions of one quantity in ``unit`` (``s``, ``us``, ``bytes``, ``ratio``, ``steps/s``, ``count``).

    ``low95`` and ``high95``: t-interval of the mean, null for fewer than two repetitions. A target
    is ``at_most`` or ``at_least``; ``met`` compares the median with it, null without a target.
    """

    bench: str
    name: str
    unit: str
    n: int
    median: float
    minimum: float
    maximum: float
    mean: float
    low95: float | None
    high95: float | None
    at_most: float | None
    at_least: float | None
    note: str

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.median <= self.at_most
        if self.at_least is not None:
            return self.median >= self.at_least
        return None

    def as_row(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {**asdict(self), "met": self.met}


def summarize(
    bench: str,
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Figure:
    """A figure from its repetitions; raises ValueError when there are none."""
    if not values:
        raise ValueError(f"{bench} {name}: nothing was measured")
    half_width = half_width_95(values)
    mean = fmean(values)
    return Figure(
        bench,
        name,
        unit,
        len(values),
        median(values),
        min(values),
        max(values),
        mean,
        None if half_width is None else mean - half_width,
        None if half_width is None else mean + half_width,
        at_most,
        at_least,
        note,
    )


def half_width_95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
