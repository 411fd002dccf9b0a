"""Where a step's time goes: seconds by class of kernel, from the profiled steps in a row's ``flags``.

``flags["time_by_kernel"]`` is the table of `instrument.trace.time_table`, summed over ``flags["trace"]["steps"]`` profiled
steps; here everything is per step."""

from __future__ import annotations

from typing import Any

import pandas as pd

from instrument.kernel_classes import CLASSES
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.selection import one_a_cell
from report.tables.table import Table, data_text, frame, identity
from report.text import number, objects

NAME = "kernel_time"
IDLE = "idle"
"""Wall time of a step during which no kernel ran."""
COLUMNS = ("case", "dtype_config", "seed", "run_id", "class", "phase", "seconds_per_step")
TOP = ("case", "dtype_config", "name", "class", "phase", "calls_per_step", "seconds_per_step", "input_shapes")
SOURCES = {"cuda_kernel_durations": "durations of the GPU's own kernels", "cpu_self_time": "self times of ops on a processor"}
MOST_TOP, MOST_PROFILES = 5, 8


def table(folder: Folder) -> Table:
    """One profiled run a case and configuration, the lowest seed that has a profile. ``summary`` holds the
    kernels that took longest (``TOP``)."""
    runs = one_a_cell(folder.runs, lambda run: isinstance(run.flags.get("time_by_kernel"), dict) and _steps(run))
    rows = [row for run in runs for row in _seconds(run)]
    if not rows:
        why = "not measured: no run holds a profile; python -m harness case CASE CONFIG --trace makes one."
        return Table.without_data(NAME, COLUMNS, "Time by class of kernel", why, folder.marks, summary=frame([], TOP))
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
    return Table(NAME, NAME, data, _title(data), caption, top, marks=folder.marks)


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
