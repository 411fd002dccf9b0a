"""Memory, utilisation and disk, as sampled while the runs went on."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.elements import outline, thinned_line
from report.plots.palette import look
from report.plots.style import INK, SMALL_PT, THIN_PT, table_figure
from report.text import clean

ROW_IN, KEY_IN, FRAME_IN = 1.3, 0.75, 0.2
MEMORY = (("gpu_memory_bytes", "GPU memory (GB)"), ("rss_bytes", "resident memory (GB)"))
DISK = ("disk_growth_bytes", "disk growth (GB)")
USE = (("gpu_percent", "GPU utilisation (%)"), ("cpu_percent", "CPU utilisation (%)"))


def draw(table) -> Figure:
    """Memory over time and as boxes, densities of utilisation, growth of the disk."""
    data = table.data
    memory, use = ([(column, label) for column, label in readings if data[column].notna().any()] for readings in (MEMORY, USE))
    frames = [frame for column, label in memory for frame in ((_over_time, column, label), (_boxes, column, label))]
    frames += [(_densities, column, label) for column, label in use]
    frames += [(_over_time, *DISK)] if data[DISK[0]].notna().any() else []
    down = (len(frames) + 2) // 2  # and a frame for the key
    heights = [ROW_IN] * down
    if len(frames) % 2 == 0:
        heights[-1] = KEY_IN  # the key has a row to itself
    figure = table_figure(table, sum(heights) + FRAME_IN, *_absent(data))
    grid = figure.subplots(down, 2, squeeze=False, height_ratios=heights).flat
    for axes, (draw_one, column, label) in zip(grid, frames, strict=False):
        draw_one(axes, data, column, label)
    _key(grid[len(frames)], data)
    for spare in grid[len(frames) + 1 :]:
        spare.axis("off")
    return figure


def _absent(data: pd.DataFrame) -> tuple[str, ...]:
    """A note that names what no run measured; it gets no empty frame."""
    absent = [label.rpartition(" (")[0] for column, label in (*MEMORY, *USE, DISK) if not data[column].notna().any()]
    return (f"Not measured: {', '.join(absent)}.",) if absent else ()


def _over_time(axes: Axes, data: pd.DataFrame, column: str, label: str) -> None:
    axes.set(ylabel=label, xlabel="time since the run's start (s)")
    for (_, config), run in data.groupby(["case", "dtype_config"], sort=False, observed=True):
        thinned_line(axes, run["time_s"].to_numpy(), run[column].to_numpy(float) / 1e9, look(config), linewidth=0.7, alpha=0.85)
    if column != "disk_growth_bytes":
        axes.set_ylim(bottom=0)


def _boxes(axes: Axes, data: pd.DataFrame, column: str, label: str) -> None:
    """Box from the first to the third quartile, whiskers at the extremes, a configuration a row."""
    groups = [
        (config, run[column].dropna().to_numpy(float) / 1e9)
        for config, run in data.groupby("dtype_config", sort=False, observed=True)
    ]
    for at, (config, values) in enumerate(groups):
        if len(values):
            low, middle, high = np.percentile(values, [25, 50, 75])
            colour = look(config).colour
            axes.plot([values.min(), values.max()], [at, at], color=colour, linewidth=0.9)
            axes.barh(at, high - low, left=low, height=0.55, color=colour, alpha=0.6, linewidth=0)
            axes.plot([middle, middle], [at - 0.28, at + 0.28], color=INK, linewidth=1.2)
    axes.set(yticks=range(len(groups)), ylim=(len(groups) - 0.4, -0.6), xlabel=label)
    axes.set_yticklabels([clean(config, 24) for config, _ in groups])
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")


def _densities(axes: Axes, data: pd.DataFrame, column: str, label: str) -> None:
    axes.set(xlabel=label, yticks=[], xlim=(0, 100))
    for config, run in data.groupby("dtype_config", sort=False, observed=True):
        values = run[column].dropna().to_numpy(float)
        if len(values):
            style = look(config)
            positions, density = outline(values)
            axes.plot(positions, density, color=style.colour, linestyle=style.line, linewidth=0.9)
            axes.axvline(np.median(values), color=style.colour, linewidth=THIN_PT, linestyle=(0, (4, 2)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("density")


def _key(axes: Axes, data: pd.DataFrame) -> None:
    """The configurations' lines by name, in the frame that is left."""
    axes.axis("off")
    for config in data["dtype_config"].unique():
        axes.plot([], [], color=look(config).colour, linestyle=look(config).line, label=clean(config, 26))
    axes.legend(loc="center left", ncols=2, fontsize=SMALL_PT, handlelength=2.2)
