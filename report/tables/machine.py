"""What the machine did: the time of a step over the run, and by class of kernel (from the profiled steps in a row's ``flags``);
what measuring costs (``overhead.json``, by ``python -m harness bench overhead``); memory, utilisation and disk.

``flags["time_by_kernel"]`` is the table of `instrument.trace.time_table`, summed over ``flags["trace"]["steps"]`` profiled
steps; here everything is per step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from instrument.kernel_classes import CLASSES
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count, printable
from report.statistics import rolling_median
from report.tables.selection import one_a_cell
from report.tables.table import Table, data_text, frame, identity, long_frame
from report.text import bracketed, gigabytes, number, objects, sentence, span

STEP_COLUMNS = ("case", "dtype_config", "seed", "step", "step_time_s", "rolling_median_s")
WINDOW_STEPS = 25
FEWEST_STEPS = 10


def step_times(folder: Folder) -> Table:
    """Step times of the lowest seed of every case and configuration, warm-up left out."""
    short = [run for run in sorted(folder.runs, key=lambda run: run.seed) if run.timed_steps < FEWEST_STEPS]
    excluded = tuple((run.run_id, f"{run.timed_steps} timed steps of at least {FEWEST_STEPS}") for run in short)
    runs = one_a_cell(folder.runs, lambda run: run.timed_steps >= FEWEST_STEPS)
    data = long_frame(runs, STEP_COLUMNS, lambda run: _timed(folder.steps(run.run_id), run.timed_steps))
    if data.empty:
        why = f"not measured: no run has {FEWEST_STEPS} timed steps."
        return Table.without_data("step_times", STEP_COLUMNS, "Step times", why, folder.marks, excluded=excluded)
    summary = pd.DataFrame([_distribution(run, data) for run in runs])
    slowest_tail = summary.loc[(summary["p95_s"] / summary["median_s"]).idxmax()]
    title = (
        f"The longest tail of step times: {slowest_tail['dtype_config']} on {slowest_tail['case']}, "
        f"P95 {slowest_tail['p95_s'] / slowest_tail['median_s']:.2f} times the median."
    )
    caption = (
        f"{data_text(folder, runs)} Left: rolling median over {WINDOW_STEPS} steps. Right: box from the first to "
        "the third quartile, line at the median, diamond at the mean, tick at the 95th percentile. One seed a "
        "configuration; steps of warm-up left out."
    )
    return Table("step_times", "step_times", data, title, caption, summary, excluded, folder.marks)


def _timed(steps: dict[str, np.ndarray], timed: int) -> dict[str, np.ndarray]:
    """The timed steps are the last ones: those before them warmed up."""
    times = steps["step_time_s"][-timed:]
    return {"step": steps["step"][-timed:], "step_time_s": times, "rolling_median_s": rolling_median(times, WINDOW_STEPS)}


def _distribution(run: RunRecord, data: pd.DataFrame) -> dict:
    own = data[(data["case"] == run.case) & (data["dtype_config"] == run.dtype_config)]["step_time_s"].to_numpy()
    own = own[np.isfinite(own)]
    facts = [*np.percentile(own, [25, 50, 75, 95]), own.mean()] if len(own) else [np.nan] * 5
    who = {"case": run.case, "dtype_config": run.dtype_config, "seed": run.seed, "n": len(own)}
    return who | dict(zip(("q1_s", "median_s", "q3_s", "p95_s", "mean_s"), facts, strict=True))


IDLE = "idle"
"""Wall time of a step during which no kernel ran."""
KERNEL_COLUMNS = ("case", "dtype_config", "seed", "run_id", "class", "phase", "seconds_per_step")
TOP = ("case", "dtype_config", "name", "class", "phase", "calls_per_step", "seconds_per_step", "input_shapes")
SOURCES = {"cuda_kernel_durations": "durations of the GPU's own kernels", "cpu_self_time": "self times of ops on a processor"}
MOST_TOP, MOST_PROFILES = 5, 8


def kernel_time(folder: Folder) -> Table:
    """One profiled run a case and configuration, the lowest seed that has a profile. ``summary`` holds the
    kernels that took longest (``TOP``)."""
    runs = one_a_cell(folder.runs, lambda run: isinstance(run.flags.get("time_by_kernel"), dict) and _steps(run))
    rows = [row for run in runs for row in _seconds(run)]
    if not rows:
        why = "not measured: no run holds a profile; python -m harness case CASE CONFIG --trace makes one."
        return Table.without_data(
            "kernel_time", KERNEL_COLUMNS, "Time by class of kernel", why, folder.marks, summary=frame([], TOP)
        )
    data = frame(rows, KERNEL_COLUMNS)
    sources = {
        SOURCES.get(source, "of an unknown source")
        for run in runs
        if isinstance(source := run.flags["time_by_kernel"].get("source"), str)
    }
    steps = sorted({_steps(run) for run in runs})
    caption = (
        f"{data_text(folder, runs)} Mean of {' or '.join(map(str, steps))} profiled steps; "
        f"{', '.join(sorted(sources))}. The profiler lengthens short ops: shares are worth more than seconds. Idle: "
        "wall time of the step during which no kernel ran. Normalisations and softmax are reductions; ours: this "
        "project's kernels."
    )
    top = frame([row for run in runs[:MOST_PROFILES] for row in _top(run)], TOP)
    return Table("kernel_time", "kernel_time", data, _largest_class(data), caption, top, marks=folder.marks)


def _steps(run: RunRecord) -> int:
    trace = run.flags.get("trace")
    steps = trace.get("steps") if isinstance(trace, dict) else None
    return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else 0


def _seconds(run: RunRecord) -> list[dict[str, Any]]:
    """A row a class and phase, in the order of the classes; idle last."""
    profile, steps = run.flags["time_by_kernel"], _steps(run)
    who = identity(run)
    by_class = profile.get("seconds")
    by_class = by_class if isinstance(by_class, dict) else {}
    classes = [*(name for name in CLASSES if name in by_class), *sorted(name for name in by_class if name not in CLASSES)]
    rows = [
        who | {"class": name, "phase": str(phase), "seconds_per_step": seconds / steps}
        for name in classes
        if isinstance(by_class[name], dict)
        for phase, value in by_class[name].items()
        if (seconds := _duration(value)) is not None
    ]
    idle = _duration(profile.get("idle_s"))
    if rows and idle is not None:
        rows.append(who | {"class": IDLE, "phase": "", "seconds_per_step": idle / steps})
    return rows


def _top(run: RunRecord) -> list[dict[str, Any]]:
    steps = _steps(run)
    return [
        identity(run)
        | {name: row.get(name) for name in ("name", "class", "phase", "input_shapes")}
        | {
            "seconds_per_step": total / steps,
            "calls_per_step": None if (calls := _duration(row.get("count"))) is None else calls / steps,
        }
        for row in objects(run.flags["time_by_kernel"].get("top"))[:MOST_TOP]
        if (total := _duration(row.get("total_s"))) is not None
    ]


def _duration(value: object) -> float | None:
    known = number(value)
    return known if known is not None and known >= 0 else None


def _largest_class(data: pd.DataFrame) -> str:
    """The largest class, and in how many profiles it is the largest."""
    busy = data[data["class"] != IDLE].groupby(["case", "dtype_config", "class"], sort=False)["seconds_per_step"].sum()
    shares = busy / busy.groupby(level=["case", "dtype_config"], sort=False).transform("sum")
    largest = shares.groupby(level=["case", "dtype_config"], sort=False).idxmax()
    wins = pd.Series([key[2] for key in largest]).value_counts()
    name = wins.index[0]
    own = shares.xs(name, level="class")
    return (
        f"Most kernel time goes to {name} in {wins.iloc[0]} of {count(len(largest), 'profile')}; its share of a step's "
        f"kernel time is {span(100 * own, '.0f')} %."
    )


ARMS = ("bare", "light", "full")
"""Instruments off, as they are by default, and all on: the figure; the table has every arm."""
BARE = ARMS[0]
ROUND_COLUMNS = ("arm", "round", "step_time_s", "ratio")
RATIO_COLUMNS = ("arm", "ratio", "low", "high", "cpu_ratio", "cpu_low", "cpu_high", "at_most", "n", "note")
CPU_SUFFIX = "_cpu"
FIELDS = {"ratio": "median", "low": "low95", "high": "high95", "at_most": "at_most", "n": "n"}
"""Column -> field of a row of the benchmark."""
EMPTY = "not measured: overhead.json is not in this folder; python -m harness bench overhead --out DIR writes it."


def overhead(folder: Folder) -> Table:
    """Step times of the bare loop beside those with instruments, round by round; ``summary``: every arm's ratio to
    the bare loop's step of the same round, with its 95 % interval, by the wall clock and in processor time."""
    document = folder.overhead or {}
    marks = _marks(folder, document)
    summary = ratios(document)
    data = _rounds(document)
    if data.empty and summary.empty:
        return Table.without_data("overhead", ROUND_COLUMNS, "Instrumentation on beside off", EMPTY, marks, summary=summary)
    empty = None if len(data) else "overhead.json holds ratios and no step times of single rounds."
    return Table("overhead", "overhead", data, _costs(summary), _caption(document, data), summary, marks=marks, empty=empty)


def ratios(document: dict[str, Any]) -> pd.DataFrame:
    """The rows in unit ``ratio``, wall clock and processor time of an arm side by side; nan where there is none."""
    rows = [row for row in objects(document.get("rows")) if row.get("unit") == "ratio" and isinstance(row.get("name"), str)]
    by_name = {row["name"]: row for row in rows}
    found = [
        {"arm": name, "note": row.get("note")}
        | {key: _number(row.get(field)) for key, field in FIELDS.items()}
        | {f"cpu_{key}": _number(by_name.get(name + CPU_SUFFIX, {}).get(FIELDS[key])) for key in ("ratio", "low", "high")}
        for name, row in by_name.items()
        if name.removesuffix(CPU_SUFFIX) not in by_name.keys() - {name}
    ]
    return frame(found, RATIO_COLUMNS)


def _rounds(document: dict[str, Any]) -> pd.DataFrame:
    """Seconds of a step by arm and round; a round in which any shown arm has no time is left out."""
    times = document.get("wall_s") if isinstance(document.get("wall_s"), dict) else {}
    lists = {arm: times[arm] for arm in ARMS if isinstance(times.get(arm), list)}
    if BARE not in lists or len(lists) < 2:
        return frame([], ROUND_COLUMNS)
    rows = []
    for at in range(min(map(len, lists.values()))):
        seconds = {arm: _number(values[at]) for arm, values in lists.items()}
        if all(value > 0 for value in seconds.values()):
            rows += [
                {"arm": arm, "round": at + 1, "step_time_s": value, "ratio": value / seconds[BARE]}
                for arm, value in seconds.items()
            ]
    return frame(rows, ROUND_COLUMNS)


def _costs(summary: pd.DataFrame) -> str:
    """The ratio of each instrumented arm, and whether the interval is clear of 1."""
    parts = []
    for row in summary[summary["arm"].isin(ARMS)].to_dict("records"):
        interval = bracketed(row["low"], row["high"], ".3f")
        unresolved = " (not resolved from 1)" if interval and row["low"] <= 1 <= row["high"] else ""
        parts.append(f"{row['ratio']:.3f}{interval} times as long with {row['arm']}{unresolved}")
    return sentence("A step takes " + ", ".join(parts)) if parts else "Not decided: no ratio of an instrumented step."


def _caption(document: dict[str, Any], data: pd.DataFrame) -> str:
    what = printable(document.get("what") or "model not recorded")
    n = data["round"].nunique() if len(data) else 0
    device = printable(document.get("device") or "device not recorded")
    return (
        f"{device}, {count(n, 'round')}; {what}. Every arm has its own copy of the model and takes its step in rotation, in an "
        "order reversed from round to round. Left: the step's time. Right: its ratio to the bare loop's step of the same "
        "round; line at the median, bar: its 95 % interval where recorded."
    )


def _marks(folder: Folder, document: dict[str, Any]) -> tuple[str, ...]:
    """This benchmark has a model and data of its own: of the folder's marks only what is true of it stays."""
    processor = str(document.get("device", "")).startswith("cpu")
    made_up = bool(document.get("simulated")) or (not document and "SIMULATED" in folder.marks)
    return (*(["CPU"] if processor else []), *(["SIMULATED"] if made_up else []))


def _number(value: object) -> float:
    """A plain finite number, else nan."""
    known = number(value)
    return math.nan if known is None else known


READINGS = {
    "gpu_memory_bytes": "gpu_memory_used_bytes",
    "rss_bytes": "process_rss_bytes",
    "gpu_percent": "gpu_utilization_percent",
    "cpu_percent": "system_cpu_percent",
}
HARDWARE_COLUMNS = ("case", "dtype_config", "seed", "time_s", *READINGS, "disk_growth_bytes")


def hardware(folder: Folder) -> Table:
    """Readings of ``hardware.jsonl`` of the lowest seed of every case and configuration that has one."""
    runs = one_a_cell(folder.runs, lambda run: folder.hardware(run.run_id) is not None)
    if not runs:
        why = "not measured: no run holds a hardware.jsonl."
        return Table.without_data("hardware", HARDWARE_COLUMNS, "Memory, utilisation and disk", why, folder.marks)
    data = long_frame(runs, HARDWARE_COLUMNS, lambda run: _readings(folder.hardware(run.run_id)))
    measure = "gpu_memory_bytes" if data["gpu_memory_bytes"].notna().any() else "rss_bytes"
    peaks = data.groupby("dtype_config", observed=True)[measure].max()
    what = "GPU memory" if measure == "gpu_memory_bytes" else "resident memory"
    title = (
        f"Highest {what}: {gigabytes(peaks.max())} ({peaks.idxmax()}); lowest peak of a configuration: "
        f"{gigabytes(peaks.min())} ({peaks.idxmin()})."
    )
    caption = (
        f"{data_text(folder, runs)} One seed a case and configuration. GPU memory is that of all processes and the "
        "driver; utilisation of the processor is that of all cores. Dashed: median. Disk: growth since the start."
    )
    return Table("hardware", "hardware", data, title, caption, marks=folder.marks)


def _readings(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time_s = columns["time_s"]
    absent = np.full(len(time_s), np.nan)
    disk = columns.get("disk_used_bytes", absent)
    known = disk[np.isfinite(disk)]
    return {
        "time_s": time_s,
        **{name: columns.get(field, absent) for name, field in READINGS.items()},
        "disk_growth_bytes": disk - (known[0] if len(known) else np.nan),
    }
