"""Where a step's time goes: seconds by class of kernel, from the profiled steps in a row's ``flags``.

``flags["time_by_kernel"]`` is the table of `instrument.trace.time_table`, summed over
``flags["trace"]["steps"]`` profiled steps; here everything is per step.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from instrument.kernel_classes import CLASSES
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.selection import case_order, series_order
from report.tables.table import Table, data_text, frame

LETTER, NAME = "kernel_time", "kernel_time"
IDLE = "idle"
"""Wall time of a step during which no kernel ran."""
COLUMNS = ("case", "dtype_config", "seed", "run_id", "class", "phase", "seconds_per_step")
TOP = ("case", "dtype_config", "name", "class", "phase", "calls_per_step", "seconds_per_step", "input_shapes")
SOURCES = {"cuda_kernel_durations": "durations of the GPU's own kernels", "cpu_self_time": "self times of ops on a processor"}
MOST_TOP, MOST_PROFILES = 5, 8


def table(folder: Folder) -> Table:
    """One profiled run a case and configuration, the lowest seed that has a profile. ``summary`` holds the
    kernels that took longest (``TOP``)."""
    runs = _profiled(folder)
    rows = [row for run in runs for row in _seconds(run)]
    if not rows:
        return Table(
            LETTER,
            NAME,
            frame([], COLUMNS),
            "Time by class of kernel",
            "",
            frame([], TOP),
            marks=folder.marks,
            empty="not measured: no run holds a profile; python -m harness case CASE CONFIG --trace makes one.",
        )
    data = frame(rows, COLUMNS)
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
    return Table(LETTER, NAME, data, _title(data), caption, top, marks=folder.marks)


def _profiled(folder: Folder) -> list[RunRecord]:
    """Runs with a profile and a number of steps to divide it by."""
    chosen: dict[tuple[str, str], RunRecord] = {}
    for run in sorted(folder.runs, key=lambda run: (run.seed, run.run_id)):
        if isinstance(run.flags.get("time_by_kernel"), dict) and _steps(run):
            chosen.setdefault((run.case, run.dtype_config), run)
    return [
        chosen[case, config]
        for case in case_order(case for case, _ in chosen)
        for config in series_order(config for at, config in chosen if at == case)
    ]


def _steps(run: RunRecord) -> int:
    trace = run.flags.get("trace")
    steps = trace.get("steps") if isinstance(trace, dict) else None
    return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else 0


def _seconds(run: RunRecord) -> list[dict[str, Any]]:
    """A row a class and phase, in the order of the classes; idle last."""
    profile, steps = run.flags["time_by_kernel"], _steps(run)
    who = {"case": run.case, "dtype_config": run.dtype_config, "seed": run.seed, "run_id": run.run_id}
    by_class = profile.get("seconds")
    by_class = by_class if isinstance(by_class, dict) else {}
    classes = [*(name for name in CLASSES if name in by_class), *sorted(name for name in by_class if name not in CLASSES)]
    rows = [
        who | {"class": name, "phase": str(phase), "seconds_per_step": seconds / steps}
        for name in classes
        if isinstance(by_class[name], dict)
        for phase, value in by_class[name].items()
        if (seconds := _number(value)) is not None
    ]
    idle = _number(profile.get("idle_s"))
    if rows and idle is not None:
        rows.append(who | {"class": IDLE, "phase": "", "seconds_per_step": idle / steps})
    return rows


def _top(run: RunRecord) -> list[dict[str, Any]]:
    steps, found = _steps(run), run.flags["time_by_kernel"].get("top")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [
        {
            "case": run.case,
            "dtype_config": run.dtype_config,
            "name": row.get("name"),
            "class": row.get("class"),
            "phase": row.get("phase"),
            "seconds_per_step": total / steps,
            "input_shapes": row.get("input_shapes"),
            "calls_per_step": None if (calls := _number(row.get("count"))) is None else calls / steps,
        }
        for row in rows[:MOST_TOP]
        if (total := _number(row.get("total_s"))) is not None
    ]


def _number(value: object) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if fine else None


def _title(data: pd.DataFrame) -> str:
    """The largest class, and in how many profiles it is the largest."""
    busy = data[data["class"] != IDLE].groupby(["case", "dtype_config", "class"], sort=False)["seconds_per_step"].sum()
    shares = busy / busy.groupby(level=["case", "dtype_config"], sort=False).transform("sum")
    largest = shares.groupby(level=["case", "dtype_config"], sort=False).idxmax()
    wins = pd.Series([key[2] for key in largest]).value_counts()
    name = wins.index[0]
    own = shares.xs(name, level="class")
    span = f"{100 * own.min():.0f} %" if own.max() - own.min() < 0.005 else f"{100 * own.min():.0f} to {100 * own.max():.0f} %"
    return (
        f"Most kernel time goes to {name} in {wins.iloc[0]} of {count(len(largest), 'profile')}; its share of a step's "
        f"kernel time is {span}."
    )
