"""How long steps take: over the run, and their distribution."""

from __future__ import annotations

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from report.statistics import rolling_median
from report.tables.selection import one_a_cell
from report.tables.table import Table, data_text, long_frame

NAME = "step_times"
COLUMNS = ("case", "dtype_config", "seed", "step", "step_time_s", "rolling_median_s")
WINDOW_STEPS = 25
FEWEST_STEPS = 10


def table(folder: Folder) -> Table:
    """Step times of the lowest seed of every case and configuration, warm-up left out."""
    short = [run for run in sorted(folder.runs, key=lambda run: run.seed) if run.timed_steps < FEWEST_STEPS]
    excluded = tuple((run.run_id, f"{run.timed_steps} timed steps of at least {FEWEST_STEPS}") for run in short)
    runs = one_a_cell(folder.runs, lambda run: run.timed_steps >= FEWEST_STEPS)
    data = long_frame(runs, COLUMNS, lambda run: _timed(folder.steps(run.run_id), run.timed_steps))
    if data.empty:
        why = f"not measured: no run has {FEWEST_STEPS} timed steps."
        return Table.without_data(NAME, COLUMNS, "Step times", why, folder.marks, excluded=excluded)
    summary = pd.DataFrame([_summary(run, data) for run in runs])
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
    return Table(NAME, NAME, data, title, caption, summary, excluded, folder.marks)


def _timed(steps: dict[str, np.ndarray], timed: int) -> dict[str, np.ndarray]:
    """The timed steps are the last ones: those before them warmed up."""
    times = steps["step_time_s"][-timed:]
    return {"step": steps["step"][-timed:], "step_time_s": times, "rolling_median_s": rolling_median(times, WINDOW_STEPS)}


def _summary(run, data: pd.DataFrame) -> dict:
    own = data[(data["case"] == run.case) & (data["dtype_config"] == run.dtype_config)]["step_time_s"].to_numpy()
    own = own[np.isfinite(own)]
    facts = [*np.percentile(own, [25, 50, 75, 95]), own.mean()] if len(own) else [np.nan] * 5
    who = {"case": run.case, "dtype_config": run.dtype_config, "seed": run.seed, "n": len(own)}
    return who | dict(zip(("q1_s", "median_s", "q3_s", "p95_s", "mean_s"), facts, strict=True))
