"""Step times over the run, and their distribution beside them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.decimate import decimate
from report.plots.palette import look
from report.plots.style import INK, THIN_PT, empty_figure, exclusion_note, new_figure
from report.plots.text import clean

LEAST_ROW_IN, BAR_IN, TITLE_IN, FRAME_IN = 1.0, 0.108, 0.33, 0.25


def draw(table) -> Figure:
    """A row a case: rolling median over steps at the left, distribution by configuration at the right."""
    data, summary = table.data, table.summary
    if table.empty or data.empty:
        return empty_figure(table.title, table.empty or "no runs", table.marks)
    cases = list(data["case"].unique())
    heights = [max(LEAST_ROW_IN, TITLE_IN + BAR_IN * (summary["case"] == case).sum()) for case in cases]
    figure = new_figure(table.title, sum(heights) + FRAME_IN, marks=table.marks, notes=exclusion_note(table.excluded))
    grid = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(1, 1), height_ratios=heights)
    for (over, spread), case in zip(grid, cases, strict=True):
        rows, facts = data[data["case"] == case], summary[summary["case"] == case]
        for config, run in rows.groupby("dtype_config", sort=False, observed=True):
            _median_line(over, run["step"].to_numpy(), run["rolling_median_s"].to_numpy() * 1e3, config)
        for at, row in enumerate(facts.to_dict("records")):
            _box(spread, at, row)
        over.set_title(clean(case))
        over.set_ylabel("step (ms)")
        over.set_ylim(0, 1.15e3 * float(facts["p95_s"].max()))
        spread.set(yticks=range(len(facts)), ylim=(len(facts) - 0.4, -0.6), xlim=(0, 1.06e3 * float(facts["p95_s"].max())))
        spread.set_yticklabels([clean(config, 24) for config in facts["dtype_config"]])
        spread.tick_params(axis="y", length=0)
        spread.grid(False, axis="y")
    grid[-1][0].set_xlabel("step")
    grid[-1][1].set_xlabel("step time (ms)")
    return figure


def _median_line(axes: Axes, x: np.ndarray, y: np.ndarray, config: str) -> None:
    style = look(config)
    shown = decimate(x, y)
    axes.plot(x[shown], y[shown], color=style.colour, linestyle=style.line, linewidth=0.9)


def _box(axes: Axes, at: int, row: dict) -> None:
    """Quartiles, median, mean and 95th percentile, as the table computed them."""
    colour = look(row["dtype_config"]).colour
    low, middle, high, p95, mean = (row[name] * 1e3 for name in ("q1_s", "median_s", "q3_s", "p95_s", "mean_s"))
    axes.barh(at, high - low, left=low, height=0.55, color=colour, alpha=0.5, linewidth=0)
    axes.plot([high, p95], [at, at], color=colour, linewidth=0.9)
    axes.plot([p95, p95], [at - 0.22, at + 0.22], color=colour, linewidth=1.0)
    axes.plot([middle, middle], [at - 0.28, at + 0.28], color=INK, linewidth=1.2)
    axes.plot(mean, at, "D", color="white", mec=INK, mew=THIN_PT, markersize=3)
