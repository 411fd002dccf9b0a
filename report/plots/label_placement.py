"""Places for names beside their markers: on no marker, no interval and no other name, with a leader that crosses none.

Every position of a grid over the frame is a candidate; a name takes the free one nearest to its marker, names of crowded
markers first. No random start and no clock, so the same figure gives the same places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.lines import Line2D
from matplotlib.text import Text

from report.plots.style import MUTED, SMALL_PT, THIN_PT

GAP_PT, LEADER_FROM_PT, MARKER_PT = 2.5, 6.0, 6.0
COLUMNS, ROWS = 90, 60
NEARER_ANOTHER, CROSSING, COVERING = 1e4, 1e6, 1e9
"""What a place costs, in pixels, that is nearer to another marker, whose leader crosses something, or whose name covers
something: worse than any distance."""


def name_markers(axes: Axes, names: Sequence[str], points: np.ndarray, obstacles: np.ndarray) -> list[Text]:
    """``names`` at ``points`` [n, 2], with a thin leader where a name stands apart from its marker; markers that cover one
    another share a text of several lines. ``obstacles`` [m, 4]: further markers and lines as x0, y0, x1, y1. All in data units;
    the frame must have its final size."""
    px = axes.figure.dpi / 72
    to_px, half = axes.transData.transform, MARKER_PT / 2 * px
    groups = _coinciding(to_px(points), half)
    texts = [
        axes.text(0, 0, "\n".join(names[at] for at in group), size=SMALL_PT, va="bottom", ha="left", linespacing=1.05)
        for group in groups
    ]
    renderer = RendererAgg(*axes.figure.bbox.size, axes.figure.dpi)  # one: a text without makes its own
    sizes = np.array([[box.width, box.height] for box in (text.get_window_extent(renderer) for text in texts)])
    every, anchors = to_px(points), np.array([to_px(points[group]).mean(axis=0) for group in groups])
    others = to_px(obstacles.reshape(-1, 2)).reshape(-1, 4) + half * np.array([-1, -1, 1, 1])
    boxes = np.r_[np.c_[every - half, every + half], others]
    box = axes.get_window_extent()
    corners = place(sizes, anchors, boxes, (box.x0, box.y0, box.x1, box.y1), GAP_PT * px)
    to_data = axes.transData.inverted().transform
    for text, corner, size, anchor in zip(texts, corners, sizes, anchors, strict=True):
        text.set_position(to_data(corner))
        end = np.clip(anchor, corner, corner + size)
        length = float(np.hypot(*(end - anchor)))
        if length > LEADER_FROM_PT * px:
            ends = to_data([anchor + (end - anchor) * half / length, end])
            axes.add_line(Line2D(*ends.T, color=MUTED, linewidth=THIN_PT, zorder=1.4))
    return texts


def _coinciding(points: np.ndarray, reach: float) -> list[list[int]]:
    """Indices by place: points within ``reach`` of a group's first one belong to it; the upper one is named first."""
    groups: list[list[int]] = []
    for at in np.argsort(-points[:, 1], kind="stable"):
        near = (group for group in groups if np.hypot(*(points[group[0]] - points[at])) < reach)
        found = next(near, None)
        if found is None:
            groups.append([int(at)])
        else:
            found.append(int(at))
    return groups


def place(
    sizes: np.ndarray, anchors: np.ndarray, obstacles: np.ndarray, frame: tuple[float, float, float, float], gap: float
) -> np.ndarray:
    """Lower left corners [n, 2] of boxes of ``sizes`` [n, 2] that name the points ``anchors`` [n, 2]: within ``frame``, on no
    obstacle [m, 4], on no other name and no other's leader, as near as they can be. Where there is no such place, the least bad
    one. Pixels throughout."""
    n = len(sizes)
    corners = np.zeros((n, 2))
    taken = np.empty((0, 4))
    leaders = np.empty((0, 4))
    apart = np.hypot(*(anchors[:, None] - anchors[None]).transpose(2, 0, 1)) + np.diag(np.full(n, np.inf))
    for at in np.argsort(apart.min(axis=1) if n > 1 else np.zeros(n), kind="stable"):
        found = _candidates(sizes[at], anchors[at], frame, gap)
        boxes = np.c_[found, found + sizes[at]]
        nearest = np.clip(anchors[at], boxes[:, :2], boxes[:, 2:])
        lines = np.c_[np.broadcast_to(anchors[at], nearest.shape), nearest]
        foreign = obstacles[~_inside(anchors[at], obstacles)]
        grown = taken + gap / 2 * np.array([-1, -1, 1, 1])
        cost = np.hypot(*(nearest - anchors[at]).T)
        cost += COVERING * (_overlaps(boxes, obstacles) + 2 * _overlaps(boxes, grown) + _enters(leaders, boxes).sum(axis=0))
        entered = _enters(lines, foreign).sum(axis=1) + _enters(lines, taken).sum(axis=1)
        cost += CROSSING * (entered + _line_crossings(lines, leaders))
        cost += NEARER_ANOTHER * _nearer_another(boxes, anchors, int(at))
        best = int(np.argmin(cost))
        corners[at] = found[best]
        taken, leaders = np.r_[taken, boxes[best : best + 1]], np.r_[leaders, lines[best : best + 1]]
    return corners


def _candidates(size: np.ndarray, anchor: np.ndarray, frame: tuple, gap: float) -> np.ndarray:
    """Right, left, above and below of the marker first, then a grid over the frame."""
    (width, height), (x, y), away = size, anchor, 3 * gap
    beside = [
        (x + away, y - height / 2),
        (x - away - width, y - height / 2),
        (x - width / 2, y + away),
        (x - width / 2, y - away - height),
        *((x + dx, y + dy) for dx in (away / 1.4, -away / 1.4 - width) for dy in (away / 1.4, -away / 1.4 - height)),
    ]
    across = np.linspace(frame[0] + gap, max(frame[0] + gap, frame[2] - gap - width), COLUMNS)
    down = np.linspace(frame[1] + gap, max(frame[1] + gap, frame[3] - gap - height), ROWS)
    grid = np.stack(np.meshgrid(across, down), axis=-1).reshape(-1, 2)
    found = np.r_[np.array(beside), grid]
    fits = (
        (found[:, 0] >= frame[0])
        & (found[:, 1] >= frame[1])
        & (found[:, 0] + width <= frame[2])
        & (found[:, 1] + height <= frame[3])
    )
    return found[fits] if fits.any() else found


def _nearer_another(boxes: np.ndarray, anchors: np.ndarray, own: int) -> np.ndarray:
    """Whether another point is as near to a box."""
    away = np.hypot(*(np.clip(anchors[None], boxes[:, None, :2], boxes[:, None, 2:]) - anchors[None]).transpose(2, 0, 1))
    return (np.delete(away, own, axis=1) <= away[:, [own]]).any(axis=1)


def _inside(point: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, :2] <= point).all(axis=1) & (point <= boxes[:, 2:]).all(axis=1)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of ``others`` each box covers."""
    low, high = boxes[:, None, :2] < others[None, :, 2:], others[None, :, :2] < boxes[:, None, 2:]
    return (low & high).all(axis=2).sum(axis=1)


def _enters(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether each line enters each box [lines, boxes] (the slab method)."""
    start, way = lines[:, None, :2], lines[:, None, 2:] - lines[:, None, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (boxes[None, :, :2] - start) / way, (boxes[None, :, 2:] - start) / way
    still = np.broadcast_to(way == 0, one.shape)
    within = (start >= boxes[None, :, :2]) & (start <= boxes[None, :, 2:])
    enter = np.where(still, np.where(within, -np.inf, np.inf), np.minimum(one, other)).max(axis=2)
    leave = np.where(still, np.where(within, np.inf, -np.inf), np.maximum(one, other)).min(axis=2)
    return (enter <= leave) & (enter <= 1) & (leave >= 0)


def _line_crossings(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of ``others`` each line crosses."""
    a, b = lines[:, None, :2], lines[:, None, 2:]
    c, d = others[None, :, :2], others[None, :, 2:]

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    return ((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)).sum(axis=1)
