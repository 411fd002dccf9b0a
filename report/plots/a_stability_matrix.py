"""A: which configuration trains on which task, at a glance."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from report.plots.palette import STATES
from report.plots.style import GRID, INK, MUTED, SMALL_PT, TEXT_PT, table_figure
from report.text import clean

ROW_IN, HEADER_IN = 0.29, 0.42
CHARACTER_IN = 0.56 * SMALL_PT / 72
LABEL_IN, FRAME_IN = 1.42, 6.9


def draw(table) -> Figure:
    """Rows: configurations, the reference first. Columns: tasks, and under them architectures."""
    data = table.data
    columns = data.drop_duplicates("case")[["case", "column", "arch", "loss_reduction"]].to_dict("records")
    rows = list(data["dtype_config"].unique())
    figure = table_figure(table, HEADER_IN + ROW_IN * len(rows), legend=_legend(data))
    whole_in, width_in = figure.get_figheight(), figure.get_figwidth()
    foot_in = figure.get_layout_engine().get()["rect"][1] * whole_in
    figure.set_layout_engine("none")
    axes = figure.add_axes(
        (LABEL_IN / width_in, foot_in / whole_in, (FRAME_IN - LABEL_IN) / width_in, ROW_IN * len(rows) / whole_in)
    )
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.axis("off")
    column_of = {column["case"]: i for i, column in enumerate(columns)}
    room = int((FRAME_IN - LABEL_IN) / len(columns) / CHARACTER_IN)
    for cell in data.to_dict("records"):
        _cell(axes, column_of[cell["case"]], rows.index(cell["dtype_config"]), cell, room)
    for at, config in enumerate(rows):
        axes.text(-0.01 * len(columns), at + 0.5, clean(config, 26), ha="right", va="center", size=TEXT_PT)
    _headers(axes, columns)
    return figure


def _cell(axes: Axes, x: int, y: int, cell: dict, room: int) -> None:
    state = STATES[cell["state"]]
    axes.add_patch(
        Rectangle(
            (x + 0.02, y + 0.04),
            0.96,
            0.92,
            facecolor=state.fill,
            edgecolor=GRID if state.hatch else state.fill,
            hatch=state.hatch,
            linewidth=0.6,
        )
    )
    lines = [f"{cell['sign']} {cell['line1']}" if cell["line1"] else str(cell["sign"]), cell["line2"] or ""]
    text = "\n".join(clean(line, room) for line in lines if line)
    box = {"facecolor": state.fill, "edgecolor": "none", "pad": 0.6} if state.hatch else None
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", size=SMALL_PT, color=state.ink, linespacing=1.12, bbox=box)


def _headers(axes: Axes, columns: list[dict]) -> None:
    """Architectures over the columns, tasks over the architectures that share them."""
    for at, column in enumerate(columns):
        sums = " Σ labels" if column["loss_reduction"] == "label_sum" else ""
        axes.text(at + 0.5, -0.12, clean(column["arch"] + sums, 18), ha="center", va="bottom", size=SMALL_PT, color=MUTED)
    start = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at]["column"] != columns[start]["column"]:
            axes.text(
                (start + at) / 2, -0.66, clean(columns[start]["column"]), ha="center", va="bottom", size=TEXT_PT, weight=600
            )
            axes.plot([start + 0.06, at - 0.06], [-0.58, -0.58], color=INK, linewidth=0.8, clip_on=False)
            start = at


def _legend(data: pd.DataFrame) -> list[Patch]:
    """The states that occur, with their sign."""
    seen = data.drop_duplicates("state").set_index("state")["sign"]
    return [
        Patch(
            facecolor=look.fill,
            edgecolor=MUTED,
            hatch=look.hatch and look.hatch * 2,
            linewidth=0.6,
            label=f"{seen[state]} {look.label}",
        )
        for state, look in STATES.items()
        if state in seen
    ]
