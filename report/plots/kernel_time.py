"""A step's time by class of kernel, a bar a configuration."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from report.plots.palette import kernel_class_look
from report.plots.style import (
    LEGEND_IN,
    MUTED,
    PAPER,
    SMALL_PT,
    THIN_PT,
    empty_figure,
    exclusion_note,
    legend_row,
    new_figure,
)
from report.plots.text import clean, short

BAR_IN, FRAME_IN, FOOT_IN = 0.2, 0.36, 0.25
MOST_BARS = 40


def draw(table) -> Figure:
    """Stacked bars from 0, a panel a case: classes in one order everywhere, idle time last and hollow."""
    data: pd.DataFrame = table.data
    if table.empty or data.empty:
        return empty_figure(table.title, table.empty or "no profile", table.marks)
    bars = data.groupby(["case", "dtype_config", "class"], sort=False)["seconds_per_step"].sum().reset_index()
    shown = bars.drop_duplicates(["case", "dtype_config"])[["case", "dtype_config"]].head(MOST_BARS)
    bars = bars.merge(shown, on=["case", "dtype_config"])
    cases = list(bars["case"].unique())
    heights = [FRAME_IN + BAR_IN * bars.loc[bars["case"] == case, "dtype_config"].nunique() for case in cases]
    figure = new_figure(
        table.title, sum(heights) + FOOT_IN + LEGEND_IN, marks=table.marks, notes=exclusion_note(table.excluded)
    )
    legend_row(figure, [_patch(name) for name in bars["class"].unique()])
    grid = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
    for (axes,), case in zip(grid, cases, strict=True):
        _panel(axes, bars[bars["case"] == case])
        axes.set_title(clean(case))
    grid[-1][0].set_xlabel("time of a step (ms)")
    return figure


def _panel(axes: Axes, bars: pd.DataFrame) -> None:
    configs = list(bars["dtype_config"].unique())
    ends = []
    for at, config in enumerate(configs):
        left = 0.0
        for row in bars[bars["dtype_config"] == config].itertuples():
            width = row.seconds_per_step * 1e3
            axes.barh(at, width, left=left, height=0.66, **_look(row[3]))
            left += width
        ends.append(left)
    for at, end in enumerate(ends):
        axes.text(end + 0.008 * max(ends), at, f"{short(end)} ms", va="center", size=SMALL_PT)
    axes.set(yticks=range(len(configs)), ylim=(len(configs) - 0.4, -0.6), xlim=(0, max(ends) * 1.09 or 1.0))
    axes.set_yticklabels([clean(config, 26) for config in configs])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _look(name: str) -> dict:
    colour = kernel_class_look(name)
    if colour is None:
        return {"facecolor": PAPER, "edgecolor": MUTED, "linewidth": THIN_PT}
    return {"facecolor": colour, "edgecolor": PAPER, "linewidth": THIN_PT}


def _patch(name: str) -> Patch:
    return Patch(label=clean(name, 16), **_look(name))
