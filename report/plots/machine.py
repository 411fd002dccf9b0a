"""What the machine did: a step's time over the run, by class of kernel, with the instruments on and off; memory, utilisation
and disk, as sampled while the runs went on."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from report.plots.elements import label_right, outline, thinned_line
from report.plots.palette import ARM_LOOKS, kernel_class_look, look
from report.plots.style import INK, MUTED, PAPER, SMALL_PT, THIN_PT, name_rows, table_figure
from report.text import clean, short

LEAST_ROW_IN, BAR_IN, TITLE_IN, FRAME_IN = 0.85, 0.092, 0.27, 0.2
CLASS_BAR_IN, CLASS_FRAME_IN, FOOT_IN = 0.2, 0.36, 0.25
MOST_BARS, BODY_IN = 40, 1.75


def draw_step_times(table) -> Figure:
    """A row a case: rolling median over steps at the left, distribution by configuration at the right."""
    data, summary = table.data, table.summary
    cases = list(data["case"].unique())
    heights = [max(LEAST_ROW_IN, TITLE_IN + BAR_IN * (summary["case"] == case).sum()) for case in cases]
    figure = table_figure(table, sum(heights) + FRAME_IN)
    grid = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(1, 1), height_ratios=heights)
    for (over, spread), case in zip(grid, cases, strict=True):
        rows, facts = data[data["case"] == case], summary[summary["case"] == case]
        for config, run in rows.groupby("dtype_config", sort=False, observed=True):
            thinned_line(over, run["step"].to_numpy(), run["rolling_median_s"].to_numpy() * 1e3, look(config), linewidth=0.9)
        for at, row in enumerate(facts.to_dict("records")):
            _box(spread, at, row)
        over.set_title(clean(case))
        over.set_ylabel("step (ms)")
        over.set_ylim(0, 1.15e3 * float(facts["p95_s"].max()))
        name_rows(spread, facts["dtype_config"])
        spread.set_xlim(0, 1.06e3 * float(facts["p95_s"].max()))
    grid[-1][0].set_xlabel("step")
    grid[-1][1].set_xlabel("step time (ms)")
    return figure


def _box(axes: Axes, at: int, row: dict) -> None:
    """Quartiles, median, mean and 95th percentile, as the table computed them."""
    colour = look(row["dtype_config"]).colour
    low, middle, high, p95, mean = (row[name] * 1e3 for name in ("q1_s", "median_s", "q3_s", "p95_s", "mean_s"))
    axes.barh(at, high - low, left=low, height=0.55, color=colour, alpha=0.5, linewidth=0)
    axes.plot([high, p95], [at, at], color=colour, linewidth=0.9)
    axes.plot([p95, p95], [at - 0.22, at + 0.22], color=colour, linewidth=1.0)
    axes.plot([middle, middle], [at - 0.28, at + 0.28], color=INK, linewidth=1.2)
    axes.plot(mean, at, "D", color="white", mec=INK, mew=THIN_PT, markersize=3)


def draw_kernel_time(table) -> Figure:
    """Stacked bars from 0, a panel a case: classes in one order everywhere, idle time last and hollow."""
    data = table.data
    bars = data.groupby(["case", "dtype_config", "class"], sort=False)["seconds_per_step"].sum().reset_index()
    shown = bars.drop_duplicates(["case", "dtype_config"])[["case", "dtype_config"]].head(MOST_BARS)
    bars = bars.merge(shown, on=["case", "dtype_config"])
    cases = list(bars["case"].unique())
    heights = [CLASS_FRAME_IN + CLASS_BAR_IN * bars.loc[bars["case"] == case, "dtype_config"].nunique() for case in cases]
    legend = [Patch(label=clean(name, 16), **_look(name)) for name in bars["class"].unique()]
    figure = table_figure(table, sum(heights) + FOOT_IN, legend=legend)
    grid = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
    for (axes,), case in zip(grid, cases, strict=True):
        _panel(axes, bars[bars["case"] == case])
        axes.set_title(clean(case))
    grid[-1][0].set_xlabel("time of a step (ms)")
    return figure


def _panel(axes: Axes, bars: pd.DataFrame) -> None:
    configs = list(bars["dtype_config"].unique())
    ends = []
    for at, config in enumerate(configs):
        left = 0.0
        for row in bars[bars["dtype_config"] == config].itertuples():
            width = row.seconds_per_step * 1e3
            axes.barh(at, width, left=left, height=0.66, **_look(row[3]))
            left += width
        ends.append(left)
    for at, end in enumerate(ends):
        axes.text(end + 0.008 * max(ends), at, f"{short(end)} ms", va="center", size=SMALL_PT)
    name_rows(axes, configs, limit=26)
    axes.set_xlim(0, max(ends) * 1.09 or 1.0)


def _look(name: str) -> dict:
    colour = kernel_class_look(name)  # None: idle time, hollow
    return {"facecolor": colour or PAPER, "edgecolor": PAPER if colour else MUTED, "linewidth": THIN_PT}


def draw_overhead(table) -> Figure:
    """Step times at the left, densities of the paired ratios at the right, one above the other."""
    data = table.data
    figure = table_figure(table, BODY_IN)
    over, paired = figure.subplots(1, 2, width_ratios=(1, 1))
    _over_rounds(over, data)
    _ratios(paired, data, table.summary)
    return figure


def _over_rounds(axes: Axes, data: pd.DataFrame) -> None:
    labels = []
    for arm, rows in data.groupby("arm", sort=False):
        x, y, look = rows["round"].to_numpy(), rows["step_time_s"].to_numpy() * 1e3, ARM_LOOKS[arm]
        thinned_line(axes, x, y, look, linewidth=0.9)
        labels.append((float(np.median(y)), clean(arm, 12), look))
    axes.set(xlabel="round", ylabel="step (ms)", ylim=(0, data["step_time_s"].max() * 1.08e3))
    label_right(axes, labels, height_in=BODY_IN - 0.35)


def _ratios(axes: Axes, data: pd.DataFrame, summary: pd.DataFrame) -> None:
    """A density a row from the arm's ratios; its median and interval as the benchmark computed them."""
    axes.axvline(1.0, color=MUTED, linewidth=0.8, zorder=0.5)
    arms = [arm for arm in data["arm"].unique() if arm != "bare"]
    known = summary.set_index("arm")
    for at, arm in enumerate(arms):
        values, look = data.loc[data["arm"] == arm, "ratio"].to_numpy(), ARM_LOOKS[arm]
        x, density = outline(values)
        axes.fill_between(x, at, at - 0.7 * density, color=look.colour, alpha=0.3, linewidth=0)
        axes.plot([np.median(values)] * 2, [at, at - 0.7], color=look.colour, linewidth=1.2)
        if arm in known.index and np.isfinite(known.loc[arm, ["low", "high"]].to_numpy(float)).all():
            ends = known.loc[arm, ["low", "high"]].to_numpy(float)
            axes.plot(ends, [at + 0.08] * 2, color=INK, linewidth=1.6, solid_capstyle="butt")
        axes.text(np.median(values), at + 0.16, f"{np.median(values):.3f}", ha="center", va="top", size=SMALL_PT)
    name_rows(axes, arms, limit=12, above=0.85, below=0.55)
    axes.set_xlabel("ratio to the bare loop's step of the round")


ROW_IN, KEY_IN = 1.3, 0.75
MEMORY = (("gpu_memory_bytes", "GPU memory (GB)"), ("rss_bytes", "resident memory (GB)"))
DISK = ("disk_growth_bytes", "disk growth (GB)")
USE = (("gpu_percent", "GPU utilisation (%)"), ("cpu_percent", "CPU utilisation (%)"))


def draw_hardware(table) -> Figure:
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
