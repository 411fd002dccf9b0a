"""Labels beside what they name, moved apart where they would overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Affine2D, ScaledTranslation, Transform, blended_transform_factory

from report.plots.palette import Look
from report.plots.style import SMALL_PT

SPACING = 1.18
"""Distance of two labels' centres, in heights of the text."""


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least ``gap`` apart, in the order of ``wanted``, within ``low`` to ``high``, with
    the least sum of squared moves (pool adjacent violators). When there is no room for
    all, the gap shrinks to what there is."""
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
    """Names right of the frame at their ``y``: (y in data units, text, look). A piece of the line leads
    to its name, which is in ink: not every line's colour is dark enough for text.

    ``height_in``: the frame's height on paper, about.
    """
    if not labels:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    wanted = [float(np.clip(to_axes.transform((x, y))[1], 0, 1)) for y, _, _ in labels]
    place = _beside(axes)
    gap = SPACING * SMALL_PT / 72 / height_in
    for at, start, (_, text, look) in zip(spread(wanted, gap, 0.02, 0.98), wanted, labels, strict=True):
        for ends, heights, style, width in (((0, 6), (start, at), "-", 0.6), ((6, 18), (at, at), look.line, 1.4)):
            axes.add_line(
                Line2D(
                    ends,
                    heights,
                    color=look.colour,
                    linestyle=style,
                    linewidth=width,
                    transform=place,
                    clip_on=False,
                    solid_capstyle="butt",
                )
            )
        axes.text(20.5, at, text, transform=place, va="center", ha="left", size=SMALL_PT)


def _beside(axes: Axes) -> Transform:
    """x: points right of the frame, whatever size it gets; y: fraction of its height."""
    points = Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans + ScaledTranslation(1, 0, axes.transAxes)
    return blended_transform_factory(points, axes.transAxes)
