"""E: how large the logits are, against what fp16 can hold; and how close every layer comes to its dtype's largest number."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.colors import LinearSegmentedColormap, to_rgba_array
from matplotlib.figure import Figure

from kernels.float_formats import FP16
from report.plots.elements import name_frame, outline
from report.plots.palette import look
from report.plots.style import FULL_WIDTH_IN, INK, SMALL_PT, THIN_PT, WARNING_INK, log_axis, table_figure
from report.tables import headroom
from report.text import clean, short

ROW_IN, FRAME_IN, MOST_IN = 0.98, 0.15, 4.3
HALF_WIDTH = 0.4
NAME_CHARACTERS = 13
WIDE_SLOT_IN, NARROW_SLOT_IN = 0.34, 0.2
HEADROOM, FOOTROOM = 25.0, 2.0


def draw(table) -> Figure:
    """A panel a case; within it a violin a seed, side by side in their configuration."""
    data = table.data
    cases = list(data["case"].unique())
    configs = _beside(list(data["dtype_config"].unique()))
    figure = table_figure(
        table,
        min(ROW_IN * len(cases), MOST_IN) + FRAME_IN,
        "Over each violin its largest finite value. n ✗: steps with a non-finite logit. Box: quartiles and median.",
    )
    grid = figure.subplots(len(cases), 1, squeeze=False, sharex=True, sharey=True)
    for (axes,), case in zip(grid, cases, strict=True):
        rows = data[data["case"] == case]
        _panel(axes, rows, table.summary[table.summary["case"] == case], configs)
        axes.set_title(clean(case))
    grid[len(cases) // 2][0].set_ylabel("largest logit")
    ends = table.summary["max"].to_numpy(float)
    low, high = grid[0][0].get_ylim()
    for (axes,) in grid:
        axes.set_ylim(low / FOOTROOM, HEADROOM * max(high, FP16.max * 1.6, *ends[np.isfinite(ends)]))
        _limit(axes, named=axes is grid[0][0])
    return figure


def _beside(configs: list[str]) -> list[str]:
    """The two that the figure compares, amp_bf16 with and without an fp32 head, side by side."""
    pair = ["amp_bf16", "amp_bf16_fp32_head"]
    if not set(pair) <= set(configs):
        return configs
    rest = [config for config in configs if config != pair[1]]
    after = rest.index(pair[0]) + 1
    return [*rest[:after], pair[1], *rest[after:]]


def _broken(name: str) -> list[str]:
    """A configuration's name on lines of at most about 13 characters, broken after an underscore."""
    lines = [""]
    for part in name.replace("_", "_ ").split(" "):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_CHARACTERS:
            lines.append("")
        lines[-1] += part
    return lines


def _panel(axes: Axes, data: pd.DataFrame, summary: pd.DataFrame, configs: list[str]) -> None:
    log_axis(axes, "y")
    seeds = sorted(data["seed"].unique())
    slot_in = FULL_WIDTH_IN * 0.92 / (len(configs) * (len(seeds) + 0.6))
    facts = summary.set_index(["dtype_config", "seed"])
    violins = _Violins()
    for (config, seed), run in data.groupby(["dtype_config", "seed"], sort=False):
        at = configs.index(config) * (len(seeds) + 0.6) + seeds.index(seed)
        values = run["logit_absmax"].to_numpy(float)
        values = values[np.isfinite(values) & (values > 0)]
        if len(values):
            violins.add(at, values, look(config).colour)
        _largest(axes, at, values, int(facts.loc[(config, seed), "nonfinite_steps"]), slot_in)
    violins.draw(axes)
    middle = (len(seeds) - 1) / 2
    axes.set_xticks([i * (len(seeds) + 0.6) + middle for i in range(len(configs))])
    axes.set_xticklabels(["\n".join(_broken(clean(config, 30))) for config in configs])
    axes.set_xlim(-0.9, len(configs) * (len(seeds) + 0.6) - 0.7)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")


class _Violins:
    """Outlines, boxes of quartiles and medians of a panel: one collection each, since a hundred artists of
    each kind take longer to place than to draw."""

    def __init__(self) -> None:
        self.outlines, self.boxes, self.medians, self.colours = [], [], [], []

    def add(self, at: float, values: np.ndarray, colour: str) -> None:
        """One violin of positive ``values`` at ``at``; its density is that of log10."""
        logs = np.log10(values)
        positions, widths = outline(logs)
        x = np.r_[at - HALF_WIDTH * widths, (at + HALF_WIDTH * widths)[::-1]]
        self.outlines.append(np.c_[x, 10 ** np.r_[positions, positions[::-1]]])
        low, middle, high = 10 ** np.percentile(logs, [25, 50, 75])
        self.boxes.append([(at - 0.11, low), (at + 0.11, low), (at + 0.11, high), (at - 0.11, high)])
        self.medians.append([(at - 0.16, middle), (at + 0.16, middle)])
        self.colours.append(colour)

    def draw(self, axes: Axes) -> None:
        """Put them on the axes and let those see all of them."""
        faces = to_rgba_array(self.colours, 0.45)
        axes.add_collection(PolyCollection(self.outlines, facecolors=faces, edgecolors=self.colours, linewidths=THIN_PT))
        axes.add_collection(PolyCollection(self.boxes, facecolors=self.colours, linewidths=0))
        for colour, width in (("white", 1.4), (INK, 0.6)):
            axes.add_collection(LineCollection(self.medians, colors=colour, linewidths=width, capstyle="butt"))
        if self.outlines:
            axes.update_datalim(np.concatenate(self.outlines))
        axes.autoscale_view()


def _largest(axes: Axes, at: float, values: np.ndarray, nonfinite_steps: int, slot_in: float) -> None:
    """The maximum over the violin, and how many steps had a non-finite logit."""
    narrow = slot_in < WIDE_SLOT_IN
    text = short(values.max(), 2 if narrow else 3) if len(values) else "none\nfinite"
    if nonfinite_steps:
        text += f"\n{nonfinite_steps} ✗"
    y = values.max() if len(values) else 1.0
    place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90 if slot_in < NARROW_SLOT_IN else 0}
    axes.annotate(text, (at, y), (0, 2), size=SMALL_PT, linespacing=0.95, **place)


def _limit(axes: Axes, *, named: bool) -> None:
    """The largest finite fp16 number, at one height in all panels, and what lies beyond it; the first panel names it."""
    axes.axhline(FP16.max, color=WARNING_INK, linewidth=0.9, linestyle=(0, (4, 1.5)))
    axes.axhspan(FP16.max, axes.get_ylim()[1], facecolor=WARNING_INK, alpha=0.06, linewidth=0)
    if not named:
        return
    place = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "bottom"}
    axes.text(0.004, FP16.max * 1.12, "over 65,504: would overflow in fp16", size=SMALL_PT, color=WARNING_INK, **place)


MAP_ROW_IN, MAP_FRAME_IN = 0.125, 0.48
MOST_BITS = 16.0
DANGER = LinearSegmentedColormap.from_list("headroom", ["#6d0f16", "#d6503c", "#f5b56a", "#f4ead2", "#dfe9f2"])


def draw_headroom(table) -> Figure:
    """A heat map a run: modules down in the order of the forward pass, steps across, bits as colour."""
    data = table.data
    runs = [run for _, run in data.groupby("run_id", sort=False)]
    heights = [MAP_ROW_IN * run["module"].nunique() + MAP_FRAME_IN for run in runs]
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
    x, y = (np.arange(size + 1) for size in cells.shape[::-1])
    mesh = axes.pcolormesh(x, y, cells.to_numpy(), cmap=DANGER, vmin=0, vmax=MOST_BITS, rasterized=True)
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
