"""F: what padding takes from the hardware's use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from report.plots.elements import cases_in_rows, decimate, label_lowest, panels
from report.plots.palette import DASH, look
from report.plots.style import INK, MUTED, SMALL_PT, table_figure
from report.text import clean, span

ROW_IN, FRAME_IN, MOST_IN = 1.5, 0.2, 2.9
MOST_POINTS = 400
WINDOWS, WINDOW_LEAST = 15, 5
"""The smoother's window is a fifteenth of the batches, five at least."""


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
        min(ROW_IN * len(rows), MOST_IN) + FRAME_IN,
        "A point a batch. Light: all tokens. Dark: real tokens. Lines: rolling median; their gap is the padding tax. "
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
        colour, x = look(config).colour, run["order"].to_numpy()
        window = max(WINDOW_LEAST, len(x) // WINDOWS)
        for name, alpha, line in ((measure.every, 0.3, DASH), (measure.real, 0.8, "-")):
            y = run[name].to_numpy(float) * measure.scale
            _points(axes, x, y, colour, alpha)
            shown = decimate(x, smooth := centred_median(y, window))
            axes.plot(x[shown], smooth[shown], color=INK, linewidth=1.0, linestyle=line)
    axes.margins(x=0.01)
    buckets = ", bucketed by length" if bucketed else ""
    axes.set_title(clean(data["case"].iloc[0]) + buckets, pad=14)
    lines = [_tax_text(config, rows) for config, rows in facts.groupby("dtype_config", sort=False)]
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 2.5), xycoords="axes fraction", textcoords="offset points", size=SMALL_PT, color=MUTED
    )


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, alpha: float) -> None:
    """A round dot a batch: one path of lines of hardly any length, since a picture of its own for each would fill the page."""
    known = np.flatnonzero(np.isfinite(y))
    known = known[:: -(-len(known) // MOST_POINTS) or 1]
    dots = np.repeat(np.c_[x[known], y[known]].astype(float), 2, axis=0)
    dots[1::2, 0] += 1e-4 * len(x)
    codes = np.tile([Path.MOVETO, Path.LINETO], len(known))
    style = {"edgecolor": colour, "facecolor": "none", "linewidth": 1.5, "capstyle": "round", "alpha": alpha, "snap": False}
    if len(known):
        path = Path(dots, codes)
        path.should_simplify = False
        axes.add_patch(PathPatch(path, **style))
        axes.update_datalim(dots)
        axes.autoscale_view()


def centred_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median of the ``window`` values around each one; of as many as there are at the ends."""
    return pd.Series(values).rolling(window, center=True, min_periods=1).median().to_numpy()


def _tax_text(config: str, facts: pd.DataFrame) -> str:
    """``amp_bf16: tax 37 to 38 %, CV real 16 %, all 2 %``: the smallest to the largest over seeds."""
    tax, real, every = (f"{span(100 * facts[column], '.0f')} %" for column in ("tax", "cv_real", "cv_all"))
    return f"{clean(config, 22)}: tax {tax}, CV real {real}, all {every}"
