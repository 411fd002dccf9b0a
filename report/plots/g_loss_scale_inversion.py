"""G: the training loss, and how far each configuration is from fp32 on the very same batch; and the loss of the LMs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instrument.terminal import count
from report.plots.elements import config_legend, end_of_run, named_series, run_line
from report.plots.palette import look
from report.plots.style import MUTED, SMALL_PT, table_figure, whole_steps
from report.tables.selection import REFERENCE
from report.text import clean, span

LOSS_IN, DIFFERENCE_IN, FRAME_IN, LM_ROW_IN = 0.86, 0.68, 0.2, 0.85


def draw(table) -> Figure:
    """Per architecture two rows: loss, and loss minus fp32_true; a column a kind of target."""
    data = table.data
    archs = list(data["arch"].unique())
    columns = sorted(
        set(zip(data["kind"], data["loss_reduction"], strict=True)),
        key=lambda key: (key[0] != "Single-label", key[1] != "mean", key),
    )
    heights = [LOSS_IN, DIFFERENCE_IN] * len(archs)
    died_at = table.summary.dropna(subset="died_at").groupby("dtype_config")["died_at"]
    when = {config: f" × @ {span(steps, '.0f')}" for config, steps in died_at}
    handles = config_legend(data["dtype_config"], lambda config: clean(config, 26) + when.get(config, ""))
    figure = table_figure(
        table,
        sum(heights) + FRAME_IN,
        "Cross: the last finite step of a run that diverged. Lower rows: training loss minus that of "
        "fp32_true on the same batch of the same seed.",
        legend=handles,
    )
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
                with named_series(axes, case, config, seed):
                    _run(axes, run["step"].to_numpy(), run[column].to_numpy(float), config, diverged, limit)
    for axes in pair:
        axes.margins(x=0.02)
    upper.tick_params(labelbottom=False)


def _run(axes: Axes, x: np.ndarray, y: np.ndarray, config: str, diverged: bool, reach: float) -> None:
    """One run's line, and a cross at its last finite step (at the frame when that is beyond it)."""
    run_line(axes, x, y, config)
    finite = np.flatnonzero(np.isfinite(y))
    if diverged and len(finite):
        end_of_run(axes, x[finite[-1]], np.clip(y[finite[-1]], -reach, reach), config)


def _reach(axes: Axes, differences: np.ndarray) -> float:
    """Limits of the lower row that a few wild steps do not set; how many lie beyond is written."""
    size = np.abs(differences[np.isfinite(differences)])
    reach = float(np.quantile(size, 0.99)) * 1.25 if len(size) else 0.0
    if reach == 0 or size.max() <= 1.6 * reach:
        return np.inf
    axes.set_ylim(-reach, reach)
    beyond = f"{count((size > reach).sum(), 'point')} beyond the frame, up to {size.max():.2g}"
    axes.text(1.0, 1.02, beyond, transform=axes.transAxes, ha="right", va="bottom", size=SMALL_PT, color=MUTED)
    return reach


def draw_lm_loss(table) -> Figure:
    """A row a case: training at the left, validation at the right; the two frames of a row share their height."""
    data = table.data
    cases = list(data["case"].unique())
    figure = table_figure(table, LM_ROW_IN * len(cases) + FRAME_IN, legend=config_legend(data["dtype_config"]))
    grid = figure.subplots(len(cases), 2, squeeze=False, sharey="row")
    for (training, validation), case in zip(grid, cases, strict=True):
        rows = data[data["case"] == case]
        for (config, seed), run in rows.groupby(["dtype_config", "seed"], sort=False, observed=True):
            for axes, column, marker in ((training, "loss", None), (validation, "val_loss", look(config).marker)):
                known = run[np.isfinite(run[column].to_numpy(float))]
                with named_series(axes, case, config, seed):
                    run_line(axes, known["step"].to_numpy(), known[column].to_numpy(float), config, marker=marker)
        training.set_title(clean(case))
        training.set_ylabel("loss (nats)")
        if not rows["val_loss"].notna().any():
            place = {"transform": validation.transAxes, "ha": "center"}
            validation.text(0.5, 0.5, "no validation loss in the logs", size=SMALL_PT, color=MUTED, **place)
            validation.set_xlim(training.get_xlim())
        for axes in (training, validation):
            axes.margins(x=0.02)
            whole_steps(axes)
    grid[-1][0].set_xlabel("step: training loss")
    grid[-1][1].set_xlabel("step: validation loss")
    return figure
