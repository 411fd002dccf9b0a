"""C: how many times as fast as fp32."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from report.plots.elements import cases_in_rows, label_lowest, panels
from report.plots.palette import look
from report.plots.style import MUTED, PAPER, SMALL_PT, name_rows, table_figure
from report.text import clean, rate

ROW_IN, FRAME_IN = 0.136, 0.41
MOST_IN_PAIRS = 4
"""Cases that stand two in a row; more stand three in a row, and the first of a row names the configurations."""
LEAST, MOST = 1 / 16, 16.0
"""An interval beyond these is cut there, with an arrow: two seeds that scatter would leave no room for the rest."""


def draw(table) -> Figure:
    """A point with its interval on a logarithmic axis, a facet a case; a run that gave no speed is a text."""
    data = table.data
    rows = cases_in_rows(data)
    if sum(map(len, rows)) > MOST_IN_PAIRS:
        cases = [case for row in rows for case in row]
        rows = [cases[at : at + 3] for at in range(0, len(cases), 3)]
    heights = [ROW_IN * max((data["case"] == case).sum() for case in row) + FRAME_IN for row in rows]
    figure = table_figure(table, sum(heights))
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False, height_ratios=heights, sharex=True)
    low, high = _reach(data)
    for axes, case in panels(grid, rows):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        _panel(axes, data[data["case"] == case])
        first = next(row[0] for row in rows if case in row)
        if list(data.loc[data["case"] == first, "dtype_config"]) == list(data.loc[data["case"] == case, "dtype_config"]):
            axes.tick_params(labelleft=case == first or len(rows[0]) < 3)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(2.0 ** np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    label_lowest(grid, "times the speed of fp32_true")
    return figure


def _reach(data: pd.DataFrame) -> tuple[float, float]:
    """Limits that hold every value and every interval's end within ``LEAST`` to ``MOST``, and 1x to 2x at least."""
    ends = data[["relative", "low", "high"]].to_numpy(float)
    ends = np.clip(ends[np.isfinite(ends)], LEAST, MOST)
    values = data["relative"].to_numpy(float)
    values = values[np.isfinite(values)]
    every = np.r_[1.0, ends, values]
    return 0.9 * float(every.min()), max(2.0, 1.1 * float(every.max()))


def _panel(axes: Axes, data: pd.DataFrame) -> None:
    axes.axvline(1.0, color=MUTED, linewidth=0.8, zorder=0.5)
    for at, row in enumerate(data.to_dict("records")):
        style = look(row["dtype_config"])
        if pd.notna(row["word"]) or not np.isfinite(row["relative"]):
            text = row["word"] if pd.notna(row["word"]) else "no speed"
            place = {"textcoords": "offset points", "va": "center"}
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
            axes.annotate(clean(text, 40), (1.0, at), (5, 0), size=SMALL_PT, color=MUTED, bbox=box, **place)
            continue
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            _interval(axes, at, row["low"], row["high"], style.colour)
        axes.plot(row["relative"], at, style.marker, color=style.colour, markersize=4.6, mec="white", mew=0.4)
        speed = f"{row['relative']:.2f}x {rate(row['samples_per_s'])}/s n={row['n']:.0f}"
        axes.text(1.015, at, speed, va="center", size=SMALL_PT, transform=axes.get_yaxis_transform())
    name_rows(axes, data["dtype_config"], limit=26)
    axes.set_title(clean(data["case"].iloc[0]))


def _interval(axes: Axes, at: float, low: float, high: float, colour: str) -> None:
    """A line with ends; an arrow's head where the interval goes on."""
    least, most = axes.get_xlim()
    axes.plot([max(low, least), min(high, most)], [at, at], color=colour, linewidth=1.1, solid_capstyle="butt")
    for x, beyond, head in ((low, low < least, "<"), (high, high > most, ">")):
        axes.plot(
            np.clip(x, least, most), at, head if beyond else "|", color=colour, markersize=4.2, mew=0.9, clip_on=False, zorder=3
        )
