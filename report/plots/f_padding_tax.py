"""F: what padding takes from the hardware's use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.elements import cases_in_rows, decimate, label_lowest, panels
from report.plots.palette import look
from report.plots.style import SMALL_PT, THIN_PT, table_figure
from report.text import clean

ROW_IN, FRAME_IN = 1.4, 0.2
POINT_BINS = 120


def draw(table) -> Figure:
    """A panel a case (with and without buckets): MFU over batches sorted by their real tokens."""
    data = table.data
    measure, summary = _measure(data), table.summary
    rows = [
        [(case, bucketed) for case in row]
        for bucketed in (False, True)
        for row in cases_in_rows(data[data["bucketed"].astype(bool) == bucketed])
    ]
    figure = table_figure(
        table,
        ROW_IN * len(rows) + FRAME_IN,
        "Thin line: all tokens. Thick line: real tokens. Shaded: the padding tax. "
        "CV: standard deviation over mean, across batches.",
    )
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    top = 1.12 * measure.scale * float(np.nanmax(data[[measure.every, measure.real]].to_numpy(float)))
    for axes, (case, bucketed) in panels(grid, rows):
        chosen, facts = (
            table[(table["case"] == case) & (table["bucketed"].astype(bool) == bucketed)] for table in (data, summary)
        )
        _panel(axes, chosen, facts, measure, bucketed)
        axes.set_ylim(0, top)
    for axes in grid[:, 0]:
        axes.set_ylabel(measure.label)
    label_lowest(grid, "batch, sorted by real tokens")
    return figure


class _Measure(NamedTuple):
    """What stands on the y axis: the columns with and without padding, and how they are printed."""

    every: str
    real: str
    scale: float
    label: str


def _measure(data: pd.DataFrame) -> _Measure:
    """MFU, or tokens per second where no MFU was measured."""
    kind = str(data["y_kind"].iloc[0])
    if kind == "tokens/s":
        return _Measure("tokens_per_s", "real_tokens_per_s", 1e-3, "thousand tokens/s")
    return _Measure("mfu_all", "mfu_real", 100.0, f"MFU, {clean(kind, 24)} (%)")


def _panel(axes: Axes, data: pd.DataFrame, facts: pd.DataFrame, measure: _Measure, bucketed: bool) -> None:
    for (config, _), run in data.groupby(["dtype_config", "seed"], sort=False):
        colour = look(config).colour
        x = run["order"].to_numpy()
        every, real = (run[name].to_numpy(float) * measure.scale for name in (measure.every, measure.real))
        for y, width, alpha in ((every, THIN_PT, 0.8), (real, 1.0, 1.0)):
            shown = decimate(x, y, bins=POINT_BINS)
            axes.plot(x[shown], y[shown], color=colour, linewidth=width, alpha=alpha)
        shown = decimate(x, every - real, bins=POINT_BINS)
        axes.fill_between(x[shown], real[shown], every[shown], color=colour, alpha=0.13, linewidth=0)
    axes.margins(x=0.01)
    buckets = ", bucketed by length" if bucketed else ""
    axes.set_title(clean(data["case"].iloc[0]) + buckets)
    lines = [_tax_text(config, rows) for config, rows in facts.groupby("dtype_config", sort=False)]
    axes.text(
        0.985,
        0.03,
        "\n".join(lines),
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        size=SMALL_PT,
        linespacing=1.2,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _tax_text(config: str, facts: pd.DataFrame) -> str:
    """``amp_bf16: tax 37 to 38 %, CV real 16 %, all 2 %``: the smallest to the largest over seeds."""
    tax, real, every = (_range(facts[column]) for column in ("tax", "cv_real", "cv_all"))
    return f"{clean(config, 22)}: tax {tax}, CV real {real}, all {every}"


def _range(values: pd.Series) -> str:
    low, high = f"{100 * values.min():.0f}", f"{100 * values.max():.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
