"""Parts that several figures share: thinned lines, density outlines, labels beside lines, grids of panels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Affine2D, ScaledTranslation, Transform, blended_transform_factory

from report.plots.palette import Look, look
from report.plots.style import SMALL_PT
from report.tables.selection import REFERENCE, series_order
from report.text import clean

BINS = 90
CELLS = 56
EDGE = 3.0
"""How many bandwidths the outline is computed beyond the data (then cut at the data's ends)."""
SERIES, FRAME = "series", "frame"
"""What the id of an artist begins with that the page reacts to, and that of a frame."""
SPACING = 1.18
"""Distance of two labels' centres, in heights of the text."""


def decimate(
    x: np.ndarray, y: np.ndarray, *, bins: int = BINS, log_x: bool = False, keep: np.ndarray | None = None
) -> np.ndarray:
    """Sorted indices of the points to draw: of every bin of ``x`` the first, the last, the smallest and the largest ``y``, and
    every non-finite one (where a line must break), plus the positions where ``keep`` is true.

    A bin is at most about two points of print wide, so the polyline through what is left covers the same ink. ``x`` must be
    ascending; short series are returned whole."""
    n = len(x)
    if n <= 4 * bins:
        return np.arange(n)
    place = np.log(np.maximum(x, 1)) if log_x else np.asarray(x, dtype=float)
    span = place[-1] - place[0]
    bin_of = np.minimum(((place - place[0]) / (span or 1.0) * bins).astype(np.int64), bins - 1)
    starts = np.flatnonzero(np.r_[True, np.diff(bin_of) > 0])
    counts = np.diff(np.r_[starts, n])
    finite = np.isfinite(y)
    kept = ~finite
    kept[starts] = kept[starts + counts - 1] = True
    for fill, extreme in ((np.inf, np.minimum), (-np.inf, np.maximum)):
        filled = np.where(finite, y, fill)
        hits = np.flatnonzero(filled == np.repeat(extreme.reduceat(filled, starts), counts))
        kept[hits[np.r_[True, np.diff(bin_of[hits]) > 0]]] = True
    if keep is not None:
        kept |= keep
    return np.flatnonzero(kept)


@contextmanager
def named_series(axes: Axes, case: object, config: object, seed: object) -> Iterator[None]:
    """Name the run that the lines added within show, for the page: a pointer over one says so, and its configuration can be
    hidden (`name_frames` adds the frame, `report.plots.write.inline` makes attributes of it)."""
    before = set(axes.lines)
    yield
    for line in set(axes.lines) - before:
        line.set_gid("|".join((SERIES, *(clean(part, 60).replace("|", "/") for part in (case, config, seed)))))


def name_frames(figure: Figure) -> None:
    """Number the frames that hold series and give each its limits, so that the page can tell the value under a pointer."""
    number = 0
    for axes in figure.axes:
        series = [artist for artist in axes.get_children() if str(artist.get_gid()).startswith(SERIES + "|")]
        if not series:
            continue
        number += 1
        for artist in series:
            artist.set_gid(f"{artist.get_gid()}|{number}")
        name_frame(axes, number)


def name_frame(axes: Axes, number: int) -> None:
    """Give a frame its number and, for the value under a pointer, its limits and scales."""
    limits = [f"{limit:.6g}" for limit in (*axes.get_xlim(), *axes.get_ylim())]
    axes.patch.set_gid("|".join((FRAME, str(number), *limits, axes.get_xscale(), axes.get_yscale())))


def thinned_line(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look, **style) -> None:
    """A configuration's line through the points that `decimate` keeps."""
    shown = decimate(x, y)
    axes.plot(x[shown], y[shown], color=look.colour, linestyle=look.line, **style)


def run_line(axes: Axes, x: np.ndarray, y: np.ndarray, config: str, *, marker: str | None = None, **thinning) -> None:
    """One run's line through the points that `decimate` keeps, broken where it is not finite. The reference is thin and on top,
    so that neither hides the other where they agree."""
    shown, first, style = decimate(x, y, **thinning), config == REFERENCE, look(config)
    axes.plot(
        x[shown],
        np.where(np.isfinite(y[shown]), y[shown], np.nan),
        color=style.colour,
        linestyle=style.line,
        marker=marker,
        linewidth=0.7 if first else 1.2,
        alpha=0.9 if first else 0.75,
        zorder=3 if first else 2,
    )


def end_of_run(axes: Axes, x: float, y: float, config: str) -> None:
    """A cross at the last finite step of a run that diverged."""
    axes.plot(x, y, "x", color=look(config).colour, markersize=6, mew=1.5, zorder=5, clip_on=False)


def config_legend(configs: Iterable[str], label: Callable[[str], str] = lambda config: clean(config, 26)) -> list[Line2D]:
    """Handles of the configurations' lines, each once, in the registry's order."""
    return [
        Line2D([], [], color=look(config).colour, linestyle=look(config).line, linewidth=1.2, label=label(config))
        for config in series_order(configs)
    ]


def outline(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel density of finite ``values``: (positions, densities scaled to a maximum of 1), from the smallest value to
    the largest. Scott's bandwidth; the values are counted in cells first, so the cost does not grow with their number beyond
    one pass.

    Raises ValueError without values. Values that are all equal give one flat stroke."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("a density needs at least one value")
    low, high = float(values.min()), float(values.max())
    bandwidth = float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0
    if high - low < 1e-9 or bandwidth < 1e-12:
        return np.array([low, high]), np.ones(2)
    width = (high - low) / (CELLS - 1)
    counts = np.bincount(np.rint((values - low) / width).astype(np.int64), minlength=CELLS)
    reach = int(np.ceil(EDGE * bandwidth / width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * width / bandwidth) ** 2)
    density = np.convolve(counts, kernel)[reach : reach + CELLS]
    return np.linspace(low, high, CELLS), density / density.max()


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least ``gap`` apart, in the order of ``wanted``, within ``low`` to ``high``, with the least sum of squared
    moves (pool adjacent violators). When there is no room for all, the gap shrinks to what there is."""
    n = len(wanted)
    if n == 0:
        return np.array([])
    gap = min(gap, (high - low) / max(n - 1, 1))
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(n)
    blocks: list[tuple[float, int]] = []
    for value in np.asarray(wanted, dtype=float)[order] - offsets:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    flat = np.concatenate([np.full(count, mean) for mean, count in blocks])
    placed = np.empty(n)
    placed[order] = np.clip(flat, low, high - gap * (n - 1)) + offsets
    return placed


def label_right(axes: Axes, labels: Sequence[tuple[float, str, Look]], *, height_in: float) -> None:
    """Names right of the frame at their ``y``: (y in data units, text, look). A piece of the line leads to its name, which is
    in ink: not every line's colour is dark enough for text.

    ``height_in``: the frame's height on paper, about."""
    if not labels:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    wanted = [float(np.clip(to_axes.transform((x, y))[1], 0, 1)) for y, _, _ in labels]
    place = _beside(axes)
    gap = SPACING * SMALL_PT / 72 / height_in
    for at, start, (_, text, own) in zip(spread(wanted, gap, 0.02, 0.98), wanted, labels, strict=True):
        for ends, heights, line, width in (((0, 6), (start, at), "-", 0.6), ((6, 18), (at, at), own.line, 1.4)):
            style = {"color": own.colour, "linestyle": line, "linewidth": width, "solid_capstyle": "butt"}
            axes.add_line(Line2D(ends, heights, transform=place, clip_on=False, **style))
        axes.text(20.5, at, text, transform=place, va="center", ha="left", size=SMALL_PT)


def _beside(axes: Axes) -> Transform:
    """x: points right of the frame, whatever size it gets; y: fraction of its height."""
    points = Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans + ScaledTranslation(1, 0, axes.transAxes)
    return blended_transform_factory(points, axes.transAxes)


def cases_in_rows(data: pd.DataFrame) -> list[list[str]]:
    """Cases as a grid of two columns: language models in the first row, then a row per classification
    task (``gpt2_multi_cls`` beside ``roberta_multi_cls``), in the table's order."""
    rows: dict[str, list[str]] = {}
    for case in data.drop_duplicates("case").to_dict("records"):
        lm = case.get("kind") == "LM" or str(case.get("column", "")).startswith("LM-")
        rows.setdefault("" if lm else case["case"].removeprefix(f"{case['arch']}_"), []).append(case["case"])
    return [row[i : i + 2] for row in rows.values() for i in range(0, len(row), 2)]


def panels(grid: np.ndarray, rows: list[list]) -> list[tuple[Axes, object]]:
    """Each frame with what it shows, row by row; frames left over are taken away."""
    pairs = []
    for axes_row, row in zip(grid, rows, strict=True):
        pairs += zip(axes_row, row, strict=False)
        for spare in axes_row[len(row) :]:
            spare.axis("off")
    return pairs


def label_lowest(grid: np.ndarray, text: str) -> None:
    """``text`` under the lowest frame in use of each column."""
    for column in grid.T:
        used = [axes for axes in column if axes.axison]
        if used:
            used[-1].set_xlabel(text)
            used[-1].tick_params(labelbottom=True)
