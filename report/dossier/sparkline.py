"""A line as small as a word: a magnitude over steps, on a logarithmic scale, in the colour of the text."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH_PX, HEIGHT_PX, EDGE_PX = 110, 22, 3


def sparkline(points: Sequence[tuple[float, float]], label: str) -> Markup | None:
    """An inline SVG of (step, magnitude >= 0), a dot on the last; zeros stand on the ground line. None for
    fewer than two points, or when all are zero: there is no line to see."""
    sizes = [value for _, value in points if value > 0]
    if len(points) < 2 or not sizes:
        return None
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    first, last = points[0][0], points[-1][0]
    drawn = []
    for step, value in points:
        x = EDGE_PX + (WIDTH_PX - 2 * EDGE_PX) * ((step - first) / (last - first) if last > first else 0.5)
        share = ((math.log2(value) - low) / (high - low) if high > low else 0.5) if value > 0 else 0.0
        drawn.append((x, HEIGHT_PX - EDGE_PX - (HEIGHT_PX - 2 * EDGE_PX) * share))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    x, y = drawn[-1]
    return Markup(
        f'<svg class="spark" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'width="{WIDTH_PX}" height="{HEIGHT_PX}" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}">'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.3"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="currentColor"/></svg>'
    )
