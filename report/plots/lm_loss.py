"""The language models' loss, run by run: training at the left, validation at the right."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.plots.elements import as_series, decimate
from report.plots.palette import look
from report.plots.style import MUTED, SMALL_PT, legend_in, legend_row, table_figure, whole_steps
from report.tables.selection import REFERENCE, series_order
from report.text import clean

ROW_IN, FRAME_IN = 0.85, 0.2


def draw(table) -> Figure:
    """A row a case; the two frames of a row share their height."""
    data = table.data
    cases, configs = list(data["case"].unique()), series_order(data["dtype_config"].unique())
    handles = [Line2D([], [], color=look(c).colour, linestyle=look(c).line, linewidth=1.2, label=clean(c, 26)) for c in configs]
    legend = legend_in(handle.get_label() for handle in handles)
    figure = table_figure(table, ROW_IN * len(cases) + FRAME_IN + legend)
    legend_row(figure, handles)
    grid = figure.subplots(len(cases), 2, squeeze=False, sharey="row")
    for (training, validation), case in zip(grid, cases, strict=True):
        for (config, seed), run in data[data["case"] == case].groupby(["dtype_config", "seed"], sort=False, observed=True):
            style, x = look(config), run["step"].to_numpy()
            first = {"zorder": 3, "linewidth": 0.8} if config == REFERENCE else {"zorder": 2, "linewidth": 1.2, "alpha": 0.75}
            for axes, column, marker in ((training, "loss", None), (validation, "val_loss", style.marker)):
                y = run[column].to_numpy(float)
                known = np.isfinite(y)
                shown = decimate(x[known], y[known])
                (line,) = axes.plot(
                    x[known][shown], y[known][shown], color=style.colour, linestyle=style.line, marker=marker, **first
                )
                as_series(line, case, config, seed)
        training.set_title(clean(case))
        training.set_ylabel("loss (nats)")
        if not data.loc[data["case"] == case, "val_loss"].notna().any():
            validation.text(
                0.5,
                0.5,
                "no validation loss in the logs",
                transform=validation.transAxes,
                ha="center",
                size=SMALL_PT,
                color=MUTED,
            )
            validation.set_xlim(training.get_xlim())
        for axes in (training, validation):
            axes.margins(x=0.02)
            whole_steps(axes)
    grid[-1][0].set_xlabel("step: training loss")
    grid[-1][1].set_xlabel("step: validation loss")
    return figure
