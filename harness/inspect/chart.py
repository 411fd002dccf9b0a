"""Magnitudes over steps and exponents of tensors, drawn with characters. No data is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.text import Text

FP16_MAX, FP16_SMALLEST_EXPONENT, FP16_NORMAL_EXPONENT, FP16_LARGEST_EXPONENT = 65504.0, -24, -14, 15
ROWS = 9
LABEL_WIDTH = 9
FORWARD, BACKWARD, BOTH, LIMIT = "●", "○", "◉", "┄"
BARS = "▁▂▃▄▅▆▇█"
WIDEST = 96


def history_chart(history: Sequence[dict[str, Any]], width: int, limit: float = FP16_MAX) -> list[Text]:
    """Largest |x| of a module by step, log scale, ``limit`` marked; forward and backward in one frame of ``width``
    characters. Empty without a positive value."""
    marks = (("absmax_fwd", FORWARD), ("absmax_bwd", BACKWARD))
    points = [(row["step"], row[key], mark) for row in history for key, mark in marks if row[key]]
    if not points:
        return []
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    columns = max(1, min(width - LABEL_WIDTH - 2, WIDEST, 6 * (last - first) + 1))
    low = min(math.log10(value) for _, value, _ in points)
    high = max(math.log10(limit), *(math.log10(value) for _, value, _ in points))
    low = min(low, high - 1)

    def row_of(value: float) -> int:
        return round((high - math.log10(value)) / (high - low) * (ROWS - 1))

    grid = [[" "] * columns for _ in range(ROWS)]
    grid[row_of(limit)] = [LIMIT] * columns
    for step, value, mark in points:
        column = round((step - first) / (last - first) * (columns - 1)) if last > first else 0
        here = grid[row_of(value)]
        here[column] = mark if here[column] in (" ", LIMIT, mark) else BOTH
    labels = {0: 10**high, ROWS // 2: 10 ** (high - (high - low) * (ROWS // 2) / (ROWS - 1)), ROWS - 1: 10**low}
    labels[row_of(limit)] = limit
    words = [number(labels[i]) if i in labels else "" for i in range(ROWS)]
    lines = [_styled(f"{word:>{LABEL_WIDTH}} ┤" + "".join(row)) for word, row in zip(words, grid, strict=True)]
    axis = f"step {first}"
    if last > first:
        axis += f"{f'step {last}':>{max(columns - len(axis), len(f'  step {last}'))}}"
    indent = " " * (LABEL_WIDTH + 1)
    return [*lines, Text(f"{indent}└{'─' * columns}", style="dim"), Text(f"{indent} {axis}", style="dim")]


def _styled(line: str) -> Text:
    text = Text(line)
    for mark, style in ((FORWARD, "cyan"), (BACKWARD, "magenta"), (BOTH, "bold"), (LIMIT, "red")):
        text.highlight_words([mark], style=style)
    return text


def histogram_lines(histograms: Sequence[dict[str, Any]], width: int) -> list[Text]:
    """A row of bars for each tensor over one axis of powers of two, fp16's range below; heights are logarithmic."""
    used = [h["lowest"] + place for h in histograms for place, count in enumerate(h["counts"]) if count]
    low = min([FP16_SMALLEST_EXPONENT, *used]) - 1
    high = max([FP16_LARGEST_EXPONENT, *used]) + 1
    names = max((len(h["tensor"]) for h in histograms), default=0)
    room = max(20, min(width, 2 * WIDEST) - names - 18)
    step = -(-(high - low + 1) // room)
    tallest = max((count for h in histograms for count in h["counts"]), default=1)
    lines = []
    for h in histograms:
        cells = [sum(_count(h, k) for k in range(start, start + step)) for start in range(low, high + 1, step)]
        bars = Text(f"{h['tensor']:>{names}} ") + Text("".join(_bar(cell, tallest * step) for cell in cells), style="cyan")
        lines.append(bars + Text(f" {h['zeros']:,} zeros" if h["zeros"] else "", style="dim"))
    return [*lines, *_ruler(low, high, step, names + 1)]


def _count(histogram: dict[str, Any], exponent: int) -> int:
    place = exponent - histogram["lowest"]
    return histogram["counts"][place] if 0 <= place < len(histogram["counts"]) else 0


def _bar(count: int, tallest: int) -> str:
    if not count:
        return " "
    return BARS[min(len(BARS) - 1, int(math.log1p(count) / math.log1p(max(1, tallest)) * len(BARS)))]


def _ruler(low: int, high: int, step: int, indent: int) -> list[Text]:
    """fp16's subnormal and normal numbers under the bars."""

    def column(exponent: int) -> int:
        return (exponent - low) // step

    start, normal, end = column(FP16_SMALLEST_EXPONENT), column(FP16_NORMAL_EXPONENT), column(FP16_LARGEST_EXPONENT)
    line = " " * start + "╶" + "┄" * (normal - start - 1) + "├" + "─" * (end - normal - 1) + "┤"
    words = [" "] * (end + 8)
    for place, word in ((start, "2^-24"), (normal, "2^-14"), (end - 3, "2^16")):
        words[place : place + len(word)] = word
    middle = "fp16 normal"
    at = normal + 6 + max(0, (end - 3 - normal - 6 - len(middle)) // 2)
    if at + len(middle) < end - 3:
        words[at : at + len(middle)] = middle
    pad = " " * indent
    return [Text(pad + line, style="red"), Text(pad + "".join(words).rstrip(), style="dim")]


def number(value: float | None) -> str:
    """A magnitude in few characters; a dash where there is none."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
