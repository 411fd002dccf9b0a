"""B: what a configuration costs in memory and gives in use of the hardware."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from report.plots.palette import arch_markers, look
from report.plots.style import (
    INK,
    LEGEND_IN,
    MUTED,
    SHADE,
    SMALL_PT,
    THIN_PT,
    legend_row,
    table_figure,
)
from report.text import clean

try:
    from adjustText import adjust_text
except ImportError:  # the one figure that needs it then says so
    adjust_text = None

PANEL_IN = 2.55
PLACEMENT_STEPS, MOST_MOVE_PX, LEADER_GAP_PT = 160, 14, 3.0
UNPLACED = "adjustText is not installed: the names stand where their markers are, over one another where those are close."
PEAK_WORDS = {
    "allocated": "peak memory allocated",
    "rss": "peak resident memory",
    "device": "peak device memory",
    "reserved": "peak memory reserved",
}


def draw(table) -> Figure:
    """A facet a task: MFU over peak memory, a Pareto frontier per case."""
    data = table.data
    tasks = list(data["column"].unique())
    across = min(2, len(tasks))
    down = -(-len(tasks) // across)
    figure = table_figure(table, PANEL_IN * down + LEGEND_IN, *(() if adjust_text else (UNPLACED,)))
    _legend(figure, data, arch_markers(list(data["arch"].unique())))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    markers = arch_markers(list(data["arch"].unique()))
    top = 132 * np.nanmax(data[["mfu_bf16_peak", "mfu_own", "high"]].to_numpy(float))
    for at, axes in enumerate(grid.flat):
        if at >= len(tasks):
            axes.axis("off")
            continue
        _panel(axes, data[data["column"] == tasks[at]], markers)
        axes.set_ylim(0, top)
        axes.set_title(clean(tasks[at]))
        if at % across == 0:
            axes.set_ylabel(_y_label(data))
        if at + across >= len(tasks):
            axes.set_xlabel(_x_label(data) + " (GB)")
    figure.get_layout_engine().execute(figure)  # labels are placed on the frames' final size
    figure.set_layout_engine("none")
    for axes, task in zip(grid.flat, tasks, strict=False):
        _alone(figure, axes)  # each placement draws what is visible
        _labels(axes, data[data["column"] == task])
    _alone(figure, None)
    return figure


def _alone(figure: Figure, shown: Axes | None) -> None:
    """Show one frame, or with None all."""
    for axes in figure.axes:
        axes.set_visible(shown is None or axes is shown)


def _y_label(data: pd.DataFrame) -> str:
    kinds = ", ".join(dict.fromkeys(clean(kind) for kind in data["y_kind"].dropna()))
    return f"MFU against the {kinds} (%)"


def _x_label(data: pd.DataFrame) -> str:
    kinds = dict.fromkeys(data["peak_kind"].dropna())
    return " or ".join(PEAK_WORDS.get(kind, clean(kind)) for kind in kinds)


def _panel(axes: Axes, data: pd.DataFrame, markers: dict[str, str]) -> None:
    x = data["peak_bytes"] / 1e9
    spare = 0.12 * ((x.max() - x.min()) or x.max() or 1.0)
    axes.set(xlim=(max(0.0, x.min() - spare), x.max() + 1.6 * spare))
    for _, case in data.groupby("case", sort=False):
        _frontier(axes, case)
    for row in data.to_dict("records"):
        style, at = look(row["dtype_config"]), (row["peak_bytes"] / 1e9, row["mfu_bf16_peak"] * 100)
        marker = markers[row["arch"]]
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            axes.plot([at[0]] * 2, [row["low"] * 100, row["high"] * 100], color=style.colour, linewidth=0.9)
        if np.isfinite(row["mfu_own"]) and abs(row["mfu_own"] - row["mfu_bf16_peak"]) > 1e-9:
            own = row["mfu_own"] * 100
            axes.plot([at[0]] * 2, [at[1], own], color=style.colour, linewidth=THIN_PT, linestyle=(0, (1, 2)))
            axes.plot(at[0], own, marker, mfc="none", mec=style.colour, mew=0.9, markersize=4.5)
        axes.plot(*at, marker, color=style.colour, markersize=5, mec="white", mew=0.4)


def _frontier(axes: Axes, case: pd.DataFrame) -> None:
    """The staircase through the points that no other beats in both, and what it dominates, shaded."""
    best = case[case["on_frontier"].astype(bool)].sort_values(["peak_bytes", "mfu_bf16_peak"])
    if best.empty:
        return
    x = np.r_[best["peak_bytes"] / 1e9, axes.get_xlim()[1]]
    y = np.maximum.accumulate(best["mfu_bf16_peak"].to_numpy() * 100)
    y = np.r_[y, y[-1]]
    axes.fill_between(x, y, step="post", color=SHADE, alpha=0.6, linewidth=0, zorder=0.2)
    axes.step(x, y, where="post", color=MUTED, linewidth=0.8, zorder=1.6)


def _labels(axes: Axes, data: pd.DataFrame) -> None:
    """A name at every filled marker, moved by adjustText until none covers another or a marker. A
    number of steps ends it and not the clock, so that the result is the same each time."""
    own = data[np.isfinite(data["mfu_own"])]
    x = np.r_[data["peak_bytes"], own["peak_bytes"]] / 1e9
    y = np.r_[data["mfu_bf16_peak"], own["mfu_own"]] * 100
    texts = [
        axes.text(at_x, at_y, clean(config, 24), size=SMALL_PT)
        for at_x, at_y, config in zip(x, y, data["dtype_config"], strict=False)
    ]
    if adjust_text is None:
        return
    adjust_text(
        texts,
        x=x,
        y=y,
        target_x=x[: len(texts)],
        target_y=y[: len(texts)],
        ax=axes,
        iter_lim=PLACEMENT_STEPS,
        max_move=(MOST_MOVE_PX, MOST_MOVE_PX),
        expand=(1.15, 1.6),
        force_text=(0.4, 0.8),
    )
    _leaders(axes, texts, np.c_[x, y][: len(texts)])


def _leaders(axes: Axes, texts: list[Text], markers: np.ndarray) -> None:
    """A thin line from every name that had to move to the marker (in data units) that it names."""
    to_data = axes.transData.inverted()
    gap_px = LEADER_GAP_PT / 72 * axes.figure.dpi
    for text, marker in zip(texts, axes.transData.transform(markers), strict=True):
        box = text.get_window_extent()
        end = np.clip(marker, box.min, box.max)  # the nearest place of the name
        length_px = float(np.hypot(*(end - marker)))
        if length_px > 3 * gap_px:
            start = marker + (end - marker) * gap_px / length_px
            x, y = to_data.transform([start, end]).T
            axes.plot(x, y, color=MUTED, linewidth=THIN_PT, scalex=False, scaley=False, zorder=1.4)


def _legend(figure: Figure, data: pd.DataFrame, markers: dict[str, str]) -> None:
    shapes = [
        Line2D([], [], linestyle="", marker=marker, color=INK, markersize=5, label=clean(arch))
        for arch, marker in markers.items()
    ]
    extra = [Line2D([], [], color=MUTED, linewidth=0.8, label="Pareto frontier, a case each (dominated: shaded)")]
    if data["mfu_own"].notna().any():
        extra.insert(
            0,
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                mfc="none",
                color=INK,
                markersize=4.5,
                label="hollow: against the peak of its own dtype",
            ),
        )
    legend_row(figure, shapes + extra)
