"""The summary of ``hardware.jsonl``, and joules over windows of time, from a counter where there is one. Pure functions,
torch-free.

A window's ends fall between two looks, so the counter is interpolated there; what lies between
those looks, at most, is on the wrong side: ``energy_edge_j``. Below `SHORTEST_S` no energy is
stated: the counters move in steps, and most cards' power is an average over a second.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from instrument.results.measurements import HardwareRecord, Mark

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


THROTTLE_REASONS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
"""Clock event reasons that make a run's speed not the card's own. At the power limit
(``sw_power_cap``) a large card works as designed: that share is reported, and is no flag."""
NO_GPU = "the run is not on a GPU"
"""The reason of the GPU's fields in a run on the processor."""
MIG_ENERGY = "a MIG instance has no energy of its own: NVML counts the whole board"
MEDIANS = (
    "gpu_utilization_percent gpu_memory_utilization_percent process_cpu_percent system_cpu_percent gpu_sm_clock_hz "
    "gpu_temperature_c".split()
)


def summarize(records: Iterable[HardwareRecord], *, window: str | None = None) -> dict[str, Any]:
    """Energy, power, memory, clocks and utilisation of a run.

    With ``window``, only what lies between that mark's begins and ends counts, except peaks, which are
    of the whole run. Figures without a reading are null; ``unknown`` has the reasons.
    """
    records = list(records)
    windows, why_no_window = _windows(records, window)
    inside = [r for r in records if any(begin <= r.time_s <= end for begin, end in windows)]
    mig = any(r.gpu_is_mig for r in records)  # the board's joules are not the instance's
    energy = energy_of(
        windows,
        counter_j=[] if mig else _series(records, "gpu_energy_counter_j"),
        power_w=[] if mig else _series(records, "gpu_power_w"),
        rapl_j=_rapl(records),
    )
    watts = _values(inside, "gpu_power_w")
    reasons = _reason_shares(inside)
    return {
        "samples": len(records),
        "samples_in_window": len(inside),
        "window": window,
        **asdict(energy),
        "why": why_no_window or (MIG_ENERGY if mig and energy.energy_j is None else None) or energy.why,
        "gpu_power_mean_w": statistics.fmean(watts) if watts else None,
        "gpu_power_peak_w": _peak(records, "gpu_power_w"),
        "peak_device_bytes": _peak(records, "gpu_memory_used_bytes"),
        "device_total_bytes": _peak(records, "gpu_memory_total_bytes"),
        "peak_rss_sampled_bytes": _peak(records, "process_rss_bytes"),
        "disk_free_least_bytes": min(_values(records, "disk_free_bytes"), default=None),
        "clock_event_reasons": reasons,
        "throttled": None if reasons is None else any(reason in reasons for reason in THROTTLE_REASONS),
        "throttle_reasons": None if reasons is None else [reason for reason in THROTTLE_REASONS if reason in reasons],
        **{f"{field}_median": statistics.median(values) if (values := _values(inside, field)) else None for field in MEDIANS},
        "unknown": _unknown(records),
    }


def windows_of(marks: Iterable[Mark], name: str) -> list[Window]:
    """The windows between a mark's begins and ends; raises ValueError when they do not alternate."""
    windows: list[Window] = []
    begin_s = None
    for mark in (mark for mark in marks if mark.name == name):
        if (mark.edge == "begin") != (begin_s is None):
            raise ValueError(f"the mark {name!r} has two {mark.edge}s in a row")
        if mark.edge == "begin":
            begin_s = mark.time_s
        else:
            windows.append((begin_s, mark.time_s))
            begin_s = None
    if begin_s is not None:
        raise ValueError(f"the mark {name!r} has no end")
    return windows


def _windows(records: list[HardwareRecord], name: str | None) -> tuple[list[Window], str | None]:
    if not records:
        return [], "the sampler wrote no record"
    if name is None:
        return [(records[0].time_s, records[-1].time_s)], None
    try:
        windows = windows_of((mark for record in records for mark in record.marks), name)
    except ValueError as error:
        return [], str(error)
    return windows, None if windows else f"the window {name!r} was never marked"


def _unknown(records: list[HardwareRecord]) -> dict[str, str]:
    """The last reason of every field that was missing, and how often it was. The first look and looks
    close to another have no shares of processor time, which is not worth a reason."""
    reasons = {field: reason for record in records for field, reason in record.unknown.items()}
    missing = {field: sum(getattr(record, field) is None for record in records) for field in reasons}
    return {
        field: reason if missing[field] == len(records) else f"{reason} ({missing[field]} of {len(records)} looks)"
        for field, reason in reasons.items()
        if missing[field] == len(records) or not field.endswith("_cpu_percent")
    }


def _series(records: list[HardwareRecord], field: str) -> list[tuple[float, float]]:
    return [(r.time_s, value) for r in records if (value := getattr(r, field)) is not None]


def _rapl(records: list[HardwareRecord]) -> list[tuple[float, float]]:
    """The processor's counter, which counts only for a run on the processor."""
    on_processor = bool(records) and records[0].unknown.get("gpu_power_w") == NO_GPU
    return _series(records, "cpu_energy_counter_j") if on_processor else []


def _reason_shares(records: list[HardwareRecord]) -> dict[str, float] | None:
    """Share of the looks at which each reason held; null when none could be read."""
    known = [r.gpu_clock_event_reasons for r in records if r.gpu_clock_event_reasons is not None]
    counts = Counter(reason for reasons in known for reason in reasons)
    return {reason: count / len(known) for reason, count in sorted(counts.items())} if known else None


def _values(records: list[HardwareRecord], field: str) -> list[Any]:
    return [value for record in records if (value := getattr(record, field)) is not None]


def _peak(records: list[HardwareRecord], field: str) -> Any:
    return max(_values(records, field), default=None)
