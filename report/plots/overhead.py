"""Instruments on beside off: a step's time, round by round, and its ratio to the bare loop's."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.decimate import decimate
from report.plots.density import outline
from report.plots.direct_labels import label_right
from report.plots.palette import ARM_LOOKS
from report.plots.style import INK, MUTED, SMALL_PT, empty_figure, new_figure
from report.plots.text import clean

BODY_IN = 1.75


def draw(table) -> Figure:
    """Step times at the left, densities of the paired ratios at the right, one above the other."""
    data: pd.DataFrame = table.data
    if table.empty or data.empty:
        return empty_figure(table.title, table.empty or "no rounds", table.marks)
    figure = new_figure(table.title, BODY_IN, marks=table.marks)
    over, paired = figure.subplots(1, 2, width_ratios=(1, 1))
    _over_rounds(over, data)
    _ratios(paired, data, table.summary)
    return figure


def _over_rounds(axes: Axes, data: pd.DataFrame) -> None:
    labels = []
    for arm, rows in data.groupby("arm", sort=False):
        x, y, look = rows["round"].to_numpy(), rows["step_time_s"].to_numpy() * 1e3, ARM_LOOKS[arm]
        shown = decimate(x, y)
        axes.plot(x[shown], y[shown], color=look.colour, linestyle=look.line, linewidth=0.9)
        labels.append((float(np.median(y)), clean(arm, 12), look))
    axes.set(xlabel="round", ylabel="step (ms)", ylim=(0, data["step_time_s"].max() * 1.08e3))
    label_right(axes, labels, height_in=BODY_IN - 0.35)


def _ratios(axes: Axes, data: pd.DataFrame, summary: pd.DataFrame) -> None:
    """A density a row from the arm's ratios; its median and interval as the benchmark computed them."""
    axes.axvline(1.0, color=MUTED, linewidth=0.8, zorder=0.5)
    arms = [arm for arm in data["arm"].unique() if arm != "bare"]
    known = summary.set_index("arm")
    for at, arm in enumerate(arms):
        values, look = data.loc[data["arm"] == arm, "ratio"].to_numpy(), ARM_LOOKS[arm]
        x, density = outline(values)
        axes.fill_between(x, at, at - 0.7 * density, color=look.colour, alpha=0.3, linewidth=0)
        axes.plot([np.median(values)] * 2, [at, at - 0.7], color=look.colour, linewidth=1.2)
        if arm in known.index and np.isfinite(known.loc[arm, ["low", "high"]].to_numpy(float)).all():
            axes.plot(
                known.loc[arm, ["low", "high"]].to_numpy(float),
                [at + 0.08] * 2,
                color=INK,
                linewidth=1.6,
                solid_capstyle="butt",
            )
        axes.text(np.median(values), at + 0.16, f"{np.median(values):.3f}", ha="center", va="top", size=SMALL_PT)
    axes.set(yticks=range(len(arms)), ylim=(len(arms) - 0.45, -0.85), xlabel="ratio to the bare loop's step of the round")
    axes.set_yticklabels([clean(arm, 12) for arm in arms])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
