"""How close every layer comes to the largest number of its dtype, step by step."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from report.plots.elements import name_frame
from report.plots.style import table_figure
from report.tables import headroom
from report.text import clean

ROW_IN, FRAME_IN = 0.125, 0.48
MOST_BITS = 16.0
DANGER = LinearSegmentedColormap.from_list("headroom", ["#6d0f16", "#d6503c", "#f5b56a", "#f4ead2", "#dfe9f2"])


def draw(table) -> Figure:
    """A heat map a run: modules down in the order of the forward pass, steps across, bits as colour."""
    data = table.data
    runs = [run for _, run in data.groupby("run_id", sort=False)]
    heights = [ROW_IN * run["module"].nunique() + FRAME_IN for run in runs]
    figure = table_figure(table, sum(heights))
    grid = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)
    for number, ((axes,), run) in enumerate(zip(grid, runs, strict=True), start=1):
        mesh = _map(axes, run)
        name_frame(axes, number)
    bar = figure.colorbar(mesh, ax=[axes for (axes,) in grid], shrink=0.6, pad=0.01, aspect=30)
    bar.set_label("headroom (bits)")
    return figure


def _map(axes: Axes, run: pd.DataFrame) -> QuadMesh:
    cells = headroom.cells(run)
    mesh = axes.pcolormesh(
        np.arange(cells.shape[1] + 1),
        np.arange(len(cells) + 1),
        cells.to_numpy(),
        cmap=DANGER,
        vmin=0,
        vmax=MOST_BITS,
        rasterized=True,
    )
    axes.set_ylim(len(cells), 0)
    axes.set_yticks(np.arange(len(cells)) + 0.5)
    axes.set_yticklabels([clean(module, 44) for module in cells.index])
    some = np.unique(np.linspace(0, cells.shape[1] - 1, 8).astype(int))
    axes.set_xticks(some + 0.5)
    axes.set_xticklabels([f"{cells.columns[at]:,}" for at in some])
    axes.set_xlabel("step")
    axes.grid(False)
    first = run.iloc[0]
    axes.set_title(clean(f"{first['case']} · {first['dtype_config']} · seed {first['seed']}", 90))
    return mesh
