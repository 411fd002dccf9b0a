"""C: how many times as fast as fp32."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.elements import cases_in_rows, label_lowest, panels
from report.plots.palette import look
from report.plots.style import INK, MUTED, SMALL_PT, name_rows, table_figure
from report.text import clean, rate

BAR_IN, FRAME_IN = 0.168, 0.5


def draw(table) -> Figure:
    """Bars from 0, a facet a task and architecture; a run that gave no speed is a text."""
    data = table.data
    rows = cases_in_rows(data)
    heights = [BAR_IN * max((data["case"] == case).sum() for case in row) + FRAME_IN for row in rows]
    figure = table_figure(table, sum(heights))
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False, height_ratios=heights, sharex=True)
    longest = np.nanmax(np.r_[data["high"].to_numpy(float), data["relative"].to_numpy(float), 1.0])
    for axes, case in panels(grid, rows):
        _panel(axes, data[data["case"] == case], longest)
    label_lowest(grid, "samples/s relative to fp32_true")
    return figure


def _panel(axes: Axes, data: pd.DataFrame, longest: float) -> None:
    axes.axvline(1.0, color=MUTED, linewidth=0.8, zorder=0.5)
    for at, row in enumerate(data.to_dict("records")):
        style = look(row["dtype_config"])
        if pd.notna(row["word"]) or not np.isfinite(row["relative"]):
            text = row["word"] if pd.notna(row["word"]) else "no speed"
            axes.text(0.015 * longest, at, clean(text, 40), va="center", size=SMALL_PT, color=MUTED)
            continue
        axes.barh(at, row["relative"], height=0.62, color=style.colour, linewidth=0)
        end = row["relative"]
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            _interval(axes, at, row["low"], row["high"])
            end = max(end, row["high"])
        speed = f"{row['relative']:.2f}x, {rate(row['samples_per_s'])}/s"
        axes.text(end + 0.02 * longest, at, speed, va="center", size=SMALL_PT)
    name_rows(axes, data["dtype_config"], limit=26)
    axes.set_xlim(0, longest * 1.42)
    axes.set_title(clean(data["case"].iloc[0]))


def _interval(axes: Axes, at: float, low: float, high: float) -> None:
    """A line with ends, light around dark so that it shows on the bar and beyond it."""
    for colour, width in (("white", 2.0), (INK, 0.8)):
        axes.plot([low, high], [at, at], color=colour, linewidth=width, solid_capstyle="butt")
        for x in (low, high):
            axes.plot([x, x], [at - 0.16, at + 0.16], color=colour, linewidth=width)
