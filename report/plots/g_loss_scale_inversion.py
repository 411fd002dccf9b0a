"""G: the training loss, and how far each configuration is from fp32 on the very same batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from instrument.terminal import count
from report.plots.elements import as_series, decimate
from report.plots.palette import look
from report.plots.style import MUTED, SMALL_PT, legend_in, legend_row, table_figure, whole_steps
from report.tables.selection import REFERENCE, series_order
from report.text import clean

LOSS_IN, DIFFERENCE_IN, FRAME_IN = 0.86, 0.68, 0.2


def draw(table) -> Figure:
    """Per architecture two rows: loss, and loss minus fp32_true; a column a kind of target."""
    data = table.data
    archs = list(data["arch"].unique())
    columns = sorted(
        set(zip(data["kind"], data["loss_reduction"], strict=True)),
        key=lambda key: (key[0] != "Single-label", key[1] != "mean", key),
    )
    heights = [LOSS_IN, DIFFERENCE_IN] * len(archs)
    handles = _legend(data, table.summary)
    figure = table_figure(
        table,
        sum(heights) + FRAME_IN + legend_in(handle.get_label() for handle in handles),
        "Cross: the last finite step of a run that diverged. Lower rows: training loss minus that of "
        "fp32_true on the same batch of the same seed.",
    )
    legend_row(figure, handles)
    grid = figure.subplots(len(heights), len(columns), squeeze=False, height_ratios=heights)
    for at, arch in enumerate(archs):
        for across, key in enumerate(columns):
            rows = data[(data["arch"] == arch) & (data["kind"] == key[0]) & (data["loss_reduction"] == key[1])]
            pair = grid[2 * at][across], grid[2 * at + 1][across]
            if rows.empty:
                for axes in pair:
                    axes.axis("off")
                continue
            _pair(pair, rows, table.summary)
            pair[0].set_title(clean(f"{key[0]} · {arch}{'' if key[1] == 'mean' else ' · ' + key[1]}"))
        grid[2 * at][0].set_ylabel("loss (nats)")
        grid[2 * at + 1][0].set_ylabel("minus fp32_true")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


def _pair(pair: tuple[Axes, Axes], rows: pd.DataFrame, summary: pd.DataFrame) -> None:
    upper, lower = pair
    upper.sharex(lower)
    whole_steps(lower)
    lower.axhline(0, color=MUTED, linewidth=0.8)
    reach = _reach(lower, rows["minus_reference"].to_numpy(float))
    divergence = summary[summary["died_at"].notna()].set_index(["case", "dtype_config", "seed"])["died_at"]
    for (case, config, seed), run in rows.groupby(["case", "dtype_config", "seed"], sort=False):  # own cases share a facet
        diverged = (case, config, seed) in divergence.index
        for axes, column, limit in ((upper, "loss", np.inf), (lower, "minus_reference", reach)):
            if axes is upper or config != REFERENCE:
                before = set(axes.lines)
                _run(axes, run["step"].to_numpy(), run[column].to_numpy(float), config, diverged, limit)
                for line in set(axes.lines) - before:
                    as_series(line, case, config, seed)
    for axes in pair:
        axes.margins(x=0.02)
    upper.tick_params(labelbottom=False)


def _run(axes: Axes, x: np.ndarray, y: np.ndarray, config: str, diverged: bool, reach: float) -> None:
    """One run's line, and a cross at its last finite step (at the frame when that is beyond it)."""
    style = look(config)
    shown = decimate(x, y)
    axes.plot(
        x[shown],
        np.where(np.isfinite(y[shown]), y[shown], np.nan),
        color=style.colour,
        linestyle=style.line,
        linewidth=0.7 if config == REFERENCE else 1.2,
        alpha=0.9 if config == REFERENCE else 0.75,
        zorder=3 if config == REFERENCE else 2,
    )
    finite = np.flatnonzero(np.isfinite(y))
    if diverged and len(finite):
        axes.plot(
            x[finite[-1]],
            np.clip(y[finite[-1]], -reach, reach),
            "x",
            color=style.colour,
            markersize=6,
            mew=1.5,
            zorder=5,
            clip_on=False,
        )


def _reach(axes: Axes, differences: np.ndarray) -> float:
    """Limits of the lower row that a few wild steps do not set; how many lie beyond is written."""
    size = np.abs(differences[np.isfinite(differences)])
    reach = float(np.quantile(size, 0.99)) * 1.25 if len(size) else 0.0
    if reach == 0 or size.max() <= 1.6 * reach:
        return np.inf
    axes.set_ylim(-reach, reach)
    axes.text(
        1.0,
        1.02,
        f"{count((size > reach).sum(), 'point')} beyond the frame, up to {size.max():.2g}",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        size=SMALL_PT,
        color=MUTED,
    )
    return reach


def _legend(data: pd.DataFrame, summary: pd.DataFrame) -> list[Line2D]:
    """Every configuration once, in the registry's order, with the steps at which it diverged."""
    handles = []
    for config in series_order(data["dtype_config"].unique()):
        steps = summary.loc[summary["dtype_config"] == config, "died_at"].dropna().astype(int)
        span = f"{steps.min()}" if steps.nunique() == 1 else f"{steps.min()} to {steps.max()}" if len(steps) else ""
        style = look(config)
        label = clean(config, 26) + (f" × @ {span}" if span else "")
        handles.append(Line2D([], [], color=style.colour, linestyle=style.line, linewidth=1.2, label=label))
    return handles
