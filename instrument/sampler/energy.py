"""Joules over windows of time, from a counter where there is one. Pure functions.

A window's ends fall between two looks, so the counter is interpolated there; what lies between
those looks, at most, is on the wrong side: ``energy_edge_j``. Below `SHORTEST_S` no energy is
stated: the counters move in steps, and most cards' power is an average over a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

COUNTER, POWER, RAPL = "nvml_energy_counter", "nvml_power_samples", "rapl_packages"
RESOLUTION_J = {COUNTER: 1e-3, POWER: None, RAPL: 1e-6}
"""The counters count in mJ (NVML) and uJ (RAPL); samples of power count nothing."""
SHORTEST_S = {COUNTER: 10.0, POWER: 10.0, RAPL: 1.0}
LONGEST_GAP_S = 3.0
"""Beyond this, what happened between two samples of power is a guess."""

Window = tuple[float, float]
Series = Sequence[tuple[float, float]]
"""(time in s, value), ascending in time."""


@dataclass(frozen=True)
class Energy:
    """``energy_j`` over ``window_s`` seconds of windows, or null and the reason ``why``."""

    energy_j: float | None
    energy_source: str | None
    energy_resolution_j: float | None
    energy_edge_j: float | None
    window_s: float
    why: str | None


def energy_of(windows: Sequence[Window], *, counter_j: Series = (), power_w: Series = (), rapl_j: Series = ()) -> Energy:
    """The energy of all ``windows`` together, from the best source that covers every one of them."""
    window_s = sum(end - begin for begin, end in windows)
    whys = []
    for source, series, measure in ((COUNTER, counter_j, _counted), (POWER, power_w, _integrated), (RAPL, rapl_j, _counted)):
        if not series:
            continue
        try:
            if window_s < SHORTEST_S[source]:
                raise ValueError(f"the windows last {window_s:.1f} s, and less than {SHORTEST_S[source]:g} s is not stated")
            parts = [measure(series, window) for window in windows]
        except ValueError as error:
            whys.append(f"{source}: {error}")
            continue
        return Energy(
            sum(part[0] for part in parts), source, RESOLUTION_J[source], sum(part[1] for part in parts), window_s, None
        )
    return Energy(None, None, None, None, window_s, "; ".join(whys) or "no energy counter and no power reading")


def energy_per(energy_j: float | None, *, steps: int, real_tokens: int) -> dict[str, float | None]:
    """Joules a step and per 1,000 real (unpadded) tokens of the same window; null where there is nothing to divide."""
    return {
        "energy_per_step_j": energy_j / steps if energy_j is not None and steps > 0 else None,
        "energy_per_1000_real_tokens_j": 1e3 * energy_j / real_tokens if energy_j is not None and real_tokens > 0 else None,
    }


def _counted(series: Series, window: Window) -> tuple[float, float]:
    """Joules between the window's ends by the counter, and how many of them lie in the looks around the ends."""
    (begin_j, begin_edge_j), (end_j, end_edge_j) = (_counter_at(series, time_s) for time_s in window)
    values = [value for time_s, value in series if window[0] <= time_s <= window[1]]
    if any(later < earlier for earlier, later in zip([begin_j, *values], [*values, end_j], strict=True)):
        raise ValueError("the counter ran backwards (a driver that was loaded anew?)")
    return end_j - begin_j, begin_edge_j + end_edge_j


def _counter_at(series: Series, time_s: float) -> tuple[float, float]:
    """The counter at a time, and its growth between the looks around it."""
    (before_s, before), (after_s, after) = _around(series, time_s)
    share = (time_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
    return before + share * (after - before), abs(after - before)


def _integrated(series: Series, window: Window) -> tuple[float, float]:
    """Joules by the trapezoid rule, and those between the looks around the window's ends."""
    begin_s, end_s = window
    inside = [(time_s, watts) for time_s, watts in series if begin_s < time_s < end_s]
    ends, edge_j = [], 0.0
    for time_s in window:
        (before_s, before), (after_s, after) = _around(series, time_s)
        share = (time_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
        ends.append((time_s, before + share * (after - before)))
        edge_j += (after_s - before_s) * (before + after) / 2
    points = [ends[0], *inside, ends[1]]
    pieces = list(pairwise(points))
    gap_s = max(later_s - earlier_s for (earlier_s, _), (later_s, _) in pieces)
    if gap_s > LONGEST_GAP_S:
        raise ValueError(f"{gap_s:.1f} s without a sample of power")
    joules = sum((later_s - earlier_s) * (earlier_w + later_w) / 2 for (earlier_s, earlier_w), (later_s, later_w) in pieces)
    return joules, edge_j


def _around(series: Series, time_s: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The samples before and after a time; an end outside all samples is not extrapolated."""
    if not series[0][0] <= time_s <= series[-1][0]:
        raise ValueError("the samples do not reach both ends of the windows")
    index = min(bisect_right(series, time_s, key=lambda sample: sample[0]), len(series) - 1)
    return series[index - 1 if index else 0], series[index]
