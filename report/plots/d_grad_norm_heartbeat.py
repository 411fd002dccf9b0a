"""D: the gradient norm, step by step, until the end of each run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instrument.terminal import count
from report.plots.elements import config_legend, decimate, end_of_run, label_right, named_series, run_line
from report.plots.palette import look
from report.plots.style import THIN_PT, log_axis, table_figure, whole_steps
from report.text import clean, span

ROW_IN, FRAME_IN, MOST_IN = 1.12, 0.3, 4.4
MOST_NAMED = 3
"""Cases whose lines are named beside each frame; with more there is one legend."""


def draw(table) -> Figure:
    """Two frames a case: steps linear at the left, logarithmic at the right, where an early divergence is seen. Many cases
    stand two in a row."""
    data = table.data
    cases = list(data["case"].unique())
    across = 1 if len(cases) <= MOST_NAMED else 2
    down = -(-len(cases) // across)
    row_in = min(ROW_IN, MOST_IN / down)
    summary = table.summary
    below = []
    if len(cases) > MOST_NAMED:
        below = config_legend(data["dtype_config"], lambda config: _label(config, summary[summary["dtype_config"] == config]))
    figure = table_figure(
        table,
        row_in * down + FRAME_IN,
        "Cross: last finite step. Triangle above the frame: step the loss scaler skipped. "
        "Ring: spike, over 5 times the rolling median.",
        legend=below,
    )
    grid = figure.subplots(down, 2 * across, squeeze=False, width_ratios=(1, 1.1) * across)
    pairs = [pair for row in grid for pair in np.split(row, across)]
    for axes in (axes for pair in pairs[len(cases) :] for axes in pair):
        axes.axis("off")
    for (linear, log), case in zip(pairs, cases, strict=False):
        log.sharey(linear)
        log.tick_params(labelleft=False)
        rows = data[data["case"] == case]
        log_axis(linear, "y")
        log_axis(log, "x")
        whole_steps(linear)
        for axes, log_x in ((linear, False), (log, True)):
            for (config, seed), run in rows.groupby(["dtype_config", "seed"], sort=False):
                with named_series(axes, case, config, seed):
                    _run(axes, run, config, log_x)
            axes.margins(x=0.02)
        linear.set_title(clean(case), pad=8)
        if not below:
            _names(log, rows, summary[summary["case"] == case], row_in - 0.42)
        if linear is grid[down // 2][0]:
            linear.set_ylabel("gradient norm")
    for linear, log in pairs[max(0, len(cases) - across) : len(cases)]:
        linear.set_xlabel("step")
        log.set_xlabel("step, logarithmic")
    return figure


def _run(axes: Axes, run: pd.DataFrame, config: str, log_x: bool) -> None:
    """One run: the line (decimated, spikes kept), its marks, its end."""
    colour, x, y = look(config).colour, run["step"].to_numpy(), run["grad_norm"].to_numpy(float)
    spike, skipped = run["spike"].to_numpy(bool), run["skipped"].to_numpy(bool)
    last = run["last_finite"].to_numpy(bool)
    run_line(axes, x, y, config, log_x=log_x, keep=spike | last)
    marks = decimate(x[spike], y[spike], bins=60, log_x=log_x)
    axes.plot(x[spike][marks], y[spike][marks], "o", mfc="none", mec=colour, mew=THIN_PT, markersize=3.4)
    if last.any():
        end_of_run(axes, x[last], y[last], config)
    if skipped.any():
        above = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(x[skipped], np.full(skipped.sum(), 1.03), "v", color=colour, markersize=3.2, mew=0, **above)


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
        seeds = f", {len(diverged_at)} of {len(summary)} runs" if len(summary) > 1 else ""
        return f"{name} × @ {span(diverged_at, '.0f')}{seeds}"
    spikes = int(summary["spikes"].sum())
    return f"{name}, {count(spikes, 'spike')}" if spikes else name
