"""D: the gradient norm, step by step, until the end of each run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instrument.terminal import count
from report.plots.elements import as_series, decimate, label_right
from report.plots.palette import look
from report.plots.style import THIN_PT, log_axis, table_figure, whole_steps
from report.tables.selection import REFERENCE
from report.text import clean

ROW_IN, FRAME_IN, MOST_IN = 1.12, 0.3, 3.8


def draw(table) -> Figure:
    """A row a case: steps linear at the left, logarithmic at the right, where an early divergence is seen."""
    data = table.data
    cases = list(data["case"].unique())
    row_in = min(ROW_IN, MOST_IN / len(cases))
    figure = table_figure(
        table,
        row_in * len(cases) + FRAME_IN,
        "Cross: last finite step. Triangle above the frame: step the loss scaler skipped. "
        "Ring: spike, over 5 times the rolling median.",
    )
    grid = figure.subplots(len(cases), 2, squeeze=False, sharey="row", width_ratios=(1, 1.1))
    for (linear, log), case in zip(grid, cases, strict=True):
        rows = data[data["case"] == case]
        summary = table.summary[table.summary["case"] == case]
        log_axis(linear, "y")
        log_axis(log, "x")
        whole_steps(linear)
        for axes, log_x in ((linear, False), (log, True)):
            for (config, seed), run in rows.groupby(["dtype_config", "seed"], sort=False):
                before = set(axes.lines)
                _run(axes, run, config, log_x)
                for line in set(axes.lines) - before:
                    as_series(line, case, config, seed)
            axes.margins(x=0.02)
        linear.set_title(clean(case), pad=8)
        linear.set_ylabel("gradient norm")
        _names(log, rows, summary, row_in - 0.42)
    grid[-1][0].set_xlabel("step")
    grid[-1][1].set_xlabel("step, logarithmic")
    return figure


def _run(axes: Axes, run: pd.DataFrame, config: str, log_x: bool) -> None:
    """One run: the line (decimated, spikes kept), its marks, its end. The reference is thin and on top, so that neither hides
    the other where they agree."""
    style = look(config)
    x, y = run["step"].to_numpy(), run["grad_norm"].to_numpy(float)
    spike, skipped = run["spike"].to_numpy(bool), run["skipped"].to_numpy(bool)
    last = run["last_finite"].to_numpy(bool)
    shown = decimate(x, y, log_x=log_x, keep=spike | last)
    axes.plot(
        x[shown],
        np.where(np.isfinite(y[shown]), y[shown], np.nan),
        color=style.colour,
        linestyle=style.line,
        linewidth=THIN_PT if config == REFERENCE else 1.3,
        alpha=0.9 if config == REFERENCE else 0.75,
        zorder=3 if config == REFERENCE else 2,
    )
    marks = decimate(x[spike], y[spike], bins=60, log_x=log_x)
    axes.plot(x[spike][marks], y[spike][marks], "o", mfc="none", mec=style.colour, mew=THIN_PT, markersize=3.4)
    if last.any():
        axes.plot(x[last], y[last], "x", color=style.colour, markersize=6, mew=1.5, zorder=5, clip_on=False)
    if skipped.any():
        axes.plot(
            x[skipped],
            np.full(skipped.sum(), 1.03),
            "v",
            color=style.colour,
            markersize=3.2,
            mew=0,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _names(axes: Axes, rows: pd.DataFrame, summary: pd.DataFrame, height_in: float) -> None:
    """Each configuration by name at the right: where it diverged, or how many spikes it has."""
    labels = []
    for config, runs in rows.groupby("dtype_config", sort=False):
        finite = runs[np.isfinite(runs["grad_norm"])]
        y = float(finite["grad_norm"].iloc[-1]) if len(finite) else axes.get_ylim()[0]
        labels.append((y, _label(config, summary[summary["dtype_config"] == config]), look(config)))
    label_right(axes, labels, height_in=height_in)


def _label(config: str, summary: pd.DataFrame) -> str:
    name = clean(config, 24)
    diverged_at = summary["died_at"].dropna()
    if len(diverged_at):
        steps = sorted({int(step) for step in diverged_at})
        where = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        seeds = f", {len(diverged_at)} of {len(summary)} seeds" if len(summary) > 1 else ""
        return f"{name} × @ {where}{seeds}"
    spikes = int(summary["spikes"].sum())
    return f"{name}, {count(spikes, 'spike')}" if spikes else name
