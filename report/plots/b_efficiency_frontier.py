"""B: what a configuration costs in memory and gives in use of the hardware."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.plots.elements import cases_in_rows, label_lowest, panels
from report.plots.label_placement import name_markers
from report.plots.palette import look
from report.plots.style import INK, MUTED, SHADE, THIN_PT, table_figure
from report.text import clean

ROW_IN, FRAME_IN, MOST_IN = 1.9, 0.3, 3.9
PEAK_WORDS = {
    "allocated": "peak memory allocated",
    "rss": "peak resident memory",
    "device": "peak device memory",
    "reserved": "peak memory reserved",
}


def draw(table) -> Figure:
    """A panel a case: MFU over peak memory, and the Pareto frontier."""
    data = table.data
    rows = cases_in_rows(data)
    figure = table_figure(table, min(ROW_IN * len(rows), MOST_IN) + FRAME_IN, legend=_legend(data))
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False, sharey=True)
    top = 125 * np.nanmax(data[["mfu_bf16_peak", "mfu_own", "high"]].to_numpy(float))
    pairs = panels(grid, rows)
    for axes, case in pairs:
        _panel(axes, data[data["case"] == case])
        axes.set_ylim(0, top)
        axes.set_title(clean(case))
    for axes in grid[:, 0]:
        axes.set_ylabel("MFU (%)")
    label_lowest(grid, _x_label(data) + " (GB)")
    figure.get_layout_engine().execute(figure)  # names are placed on the frames' final size
    figure.set_layout_engine("none")
    for axes, case in pairs:
        _names(axes, data[data["case"] == case])
    return figure


def _x_label(data: pd.DataFrame) -> str:
    kinds = dict.fromkeys(data["peak_kind"].dropna())
    return " or ".join(PEAK_WORDS.get(kind, clean(kind)) for kind in kinds)


def _panel(axes: Axes, data: pd.DataFrame) -> None:
    x = data["peak_bytes"] / 1e9
    spare = 0.2 * ((x.max() - x.min()) or x.max() or 1.0)
    axes.set(xlim=(max(0.0, x.min() - spare), x.max() + 1.3 * spare))
    _frontier(axes, data)
    for row in data.to_dict("records"):
        style, at = look(row["dtype_config"]), (row["peak_bytes"] / 1e9, row["mfu_bf16_peak"] * 100)
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            axes.plot([at[0]] * 2, [row["low"] * 100, row["high"] * 100], color=style.colour, linewidth=0.9)
        if _has_own(row):
            own = row["mfu_own"] * 100
            axes.plot([at[0]] * 2, [at[1], own], color=style.colour, linewidth=THIN_PT, linestyle=(0, (1, 2)))
            axes.plot(at[0], own, style.marker, mfc="none", mec=style.colour, mew=0.9, markersize=4.5)
        axes.plot(*at, style.marker, color=style.colour, markersize=5, mec="white", mew=0.4)


def _has_own(row: dict) -> bool:
    """Whether the MFU against the own dtype's peak is another number."""
    return bool(np.isfinite(row["mfu_own"]) and abs(row["mfu_own"] - row["mfu_bf16_peak"]) > 1e-9)


def _frontier(axes: Axes, case: pd.DataFrame) -> None:
    """The staircase through the points that no other beats in both, and what it dominates, shaded."""
    x, y = _staircase(axes, case)
    if len(x):
        axes.fill_between(x, y, step="post", color=SHADE, alpha=0.6, linewidth=0, zorder=0.2)
        axes.step(x, y, where="post", color=MUTED, linewidth=0.8, zorder=1.6)


def _staircase(axes: Axes, case: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the frontier to the frame's right edge (GB, %); empty without a frontier."""
    best = case[case["on_frontier"].astype(bool)].sort_values(["peak_bytes", "mfu_bf16_peak"])
    y = np.maximum.accumulate(best["mfu_bf16_peak"].to_numpy(float) * 100)
    return (np.r_[best["peak_bytes"] / 1e9, axes.get_xlim()[1]], np.r_[y, y[-1]]) if len(y) else (y, y)


def _names(axes: Axes, data: pd.DataFrame) -> None:
    """A name at every filled marker; intervals, hollow markers and the frontier are in the way."""
    rows = data.to_dict("records")
    points = np.array([[row["peak_bytes"] / 1e9, 100 * row["mfu_bf16_peak"]] for row in rows])
    spans = [[x, 100 * row["low"], x, 100 * row["high"]] for (x, _), row in zip(points, rows, strict=True)]
    hollow = [[x, 100 * row["mfu_own"]] * 2 for (x, _), row in zip(points, rows, strict=True) if _has_own(row)]
    x, y = _staircase(axes, data)
    steps = [[x[at], y[at], x[at + 1], y[at]] for at in range(len(x) - 1)] + [
        [x[at], y[at - 1], x[at], y[at]] for at in range(1, len(x) - 1)
    ]
    obstacles = np.array([box for box in (*spans, *hollow, *steps) if np.isfinite(box).all()]).reshape(-1, 4)
    name_markers(axes, [clean(row["dtype_config"], 24) for row in rows], points, obstacles)


def _legend(data: pd.DataFrame) -> list[Line2D]:
    handles = [Line2D([], [], color=MUTED, linewidth=0.8, label="Pareto frontier (dominated: shaded)")]
    if any(_has_own(row) for row in data.to_dict("records")):
        hollow = {"linestyle": "", "marker": "o", "mfc": "none", "color": INK, "markersize": 4.5}
        handles.insert(0, Line2D([], [], **hollow, label="hollow: against the peak of its own dtype"))
    return handles
