"""H: does the best configuration for language modelling stay the best for classification?"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.plots.palette import look
from report.plots.style import GRID, INK, MUTED, SMALL_PT, name_rows, table_figure
from report.text import clean

ROW_IN, FRAME_IN = 0.27, 0.75
SIDES = ("LM", "classification")
OFFSET = {"LM": -0.17, "classification": 0.17}


def draw(table) -> Figure:
    """Left: ranks joined by lines, ties bracketed. Right: the relative speeds that they rank."""
    data = table.data
    configs = list(dict.fromkeys(data.sort_values(["side", "rank"], ascending=True)["dtype_config"]))
    figure = table_figure(table, ROW_IN * len(configs) + FRAME_IN, *_tau_note(table.summary))
    slope, speed = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _slopes(slope, data, len(configs))
    _speeds(speed, data, configs)
    return figure


def _tau_note(summary: pd.DataFrame) -> tuple[str, ...]:
    """Kendall's tau with its interval, or why there is none: computed by the table."""
    if summary.empty:
        return ()
    row = summary.iloc[0]
    if pd.isna(row["tau"]):
        return (clean(row["note"], 300),) if row["note"] else ()
    text = (
        f"Kendall's tau {row['tau']:+.2f} [{row['tau_low']:+.2f}, {row['tau_high']:+.2f}] over "
        f"{int(row['n_configs'])} configurations"
    )
    return (text + (f"; {clean(row['note'], 240)}" if row["note"] else ""),)


def _slopes(axes: Axes, data: pd.DataFrame, n: int) -> None:
    sides = {side: data[data["side"] == side].set_index("dtype_config").sort_values("rank") for side in SIDES}
    places = {side: {config: at for at, config in enumerate(rows.index)} for side, rows in sides.items()}
    tied = {side: rows["tie_group"].duplicated(keep=False) for side, rows in sides.items()}
    for config in (config for config in places["LM"] if config in places["classification"]):
        style = look(config)
        grey = tied["LM"].get(config, False) and tied["classification"].get(config, False)
        axes.plot(
            [0, 1],
            [places[side][config] for side in SIDES],
            color=GRID if grey else style.colour,
            linestyle=style.line,
            linewidth=1.3,
            zorder=1 if grey else 2,
        )
    for x, side, align, pad in ((0, "LM", "right", -7), (1, "classification", "left", 7)):
        for config, at in places[side].items():
            style = look(config)
            axes.plot(x, at, style.marker, color=style.colour, markersize=5.5, mec="white", mew=0.4, zorder=3)
            label = (
                f"{sides[side].loc[config, 'rank']:g}  {clean(config, 24)}"
                if x == 0
                else f"{clean(config, 24)}  {sides[side].loc[config, 'rank']:g}"
            )
            axes.annotate(label, (x, at), xytext=(pad, 0), textcoords="offset points", ha=align, va="center", size=SMALL_PT)
        _brackets(axes, x, sides[side])
    axes.set(xlim=(-1.75, 2.75), ylim=(n - 0.4, -0.9), yticks=[], xticks=[0, 1], xticklabels=SIDES)
    axes.set_title("Rank by throughput (bracket: not separated by the seeds)")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(False)


def _brackets(axes: Axes, x: int, rows: pd.DataFrame) -> None:
    """A bracket around each group of neighbours that the seeds do not separate."""
    at = pd.Series(range(len(rows)), index=rows.index)
    outward = -1 if x == 0 else 1
    for _, group in at.groupby(rows["tie_group"]):
        if len(group) < 2:
            continue
        low, high, edge = group.min() - 0.25, group.max() + 0.25, x + outward * 1.68
        axes.plot(
            [edge - outward * 0.04, edge, edge, edge - outward * 0.04], [low, low, high, high], color=MUTED, linewidth=0.9
        )


def _speeds(axes: Axes, data: pd.DataFrame, configs: list[str]) -> None:
    axes.axvline(1.0, color=MUTED, linewidth=0.8)
    for row in data.to_dict("records"):
        style, y = look(row["dtype_config"]), configs.index(row["dtype_config"]) + OFFSET[row["side"]]
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            axes.plot([row["low"], row["high"]], [y, y], color=style.colour, linewidth=1.0)
        hollow = row["side"] == "classification"
        axes.plot(
            row["relative"], y, style.marker, mec=style.colour, mfc="white" if hollow else style.colour, mew=0.8, markersize=5.2
        )
    name_rows(axes, configs, above=0.9)
    axes.set_xlabel("samples/s relative to fp32_true")
    axes.set_xlim(0, 1.08 * np.nanmax(data[["relative", "high", "low"]].to_numpy(float)))
    axes.set_title("Relative speed (hollow: classification)")
    axes.title.set_color(INK)
