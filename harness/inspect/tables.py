"""What an inspected run's figures look like in characters: tables of ops and tensors, magnitudes over steps, exponents.
No reading, and no arithmetic beyond formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from rich.table import Table
from rich.text import Text

from instrument.results.schemas import KIND_NAMES
from instrument.terminal import count, plain_table
from kernels.float_formats import FP16, float_format

FP16_SMALLEST_EXPONENT = FP16.min_exponent - FP16.mantissa_bits
ROWS = 9
LABEL_WIDTH = 9
FORWARD, BACKWARD, BOTH, LIMIT = "●", "○", "◉", "┄"
BARS = "▁▂▃▄▅▆▇█"
WIDEST = 96


def history_chart(history: Sequence[dict[str, Any]], width: int, limit: float = FP16.max) -> list[Text]:
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
    lines = [Text(f"{number(labels[i]) if i in labels else '':>{LABEL_WIDTH}} ┤{''.join(grid[i])}") for i in range(ROWS)]
    for line, (mark, style) in product(lines, ((FORWARD, "cyan"), (BACKWARD, "magenta"), (BOTH, "bold"), (LIMIT, "red"))):
        line.highlight_words([mark], style=style)
    axis = f"step {first}"
    if last > first:
        axis += f"{f'step {last}':>{max(columns - len(axis), len(f'  step {last}'))}}"
    indent = " " * (LABEL_WIDTH + 1)
    return [*lines, Text(f"{indent}└{'─' * columns}", style="dim"), Text(f"{indent} {axis}", style="dim")]


def histogram_lines(histograms: Sequence[dict[str, Any]], width: int) -> list[Text]:
    """A row of bars for each tensor over one axis of powers of two, fp16's range below; heights are logarithmic."""
    used = [h["lowest"] + place for h in histograms for place, count in enumerate(h["counts"]) if count]
    low = min([FP16_SMALLEST_EXPONENT, *used]) - 1
    high = max([FP16.max_exponent, *used]) + 1
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

    start, normal, end = column(FP16_SMALLEST_EXPONENT), column(FP16.min_exponent), column(FP16.max_exponent)
    line = " " * start + "╶" + "┄" * (normal - start - 1) + "├" + "─" * (end - normal - 1) + "┤"
    labels = [" "] * (end + 8)
    for place, label in ((start, "2^-24"), (normal, "2^-14"), (end - 3, "2^16")):
        labels[place : place + len(label)] = label
    middle = "fp16 normal"
    at = normal + 6 + max(0, (end - 3 - normal - 6 - len(middle)) // 2)
    if at + len(middle) < end - 3:
        labels[at : at + len(middle)] = middle
    pad = " " * indent
    return [Text(pad + line, style="red"), Text(pad + "".join(labels).rstrip(), style="dim")]


def number(value: float | None) -> str:
    """A magnitude in few characters; a dash where there is none."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


MOST_LINKS, MOST_EVENTS = 12, 8
WIDE = 100
"""Columns from which there is room for an op's whole name."""
OP_SHARE = 4
"""An op's name takes at most this part of the width; its end is shown."""


def chain_table(links: Sequence[dict[str, Any]], width: int, culprit_kind: str | None = None) -> Table:
    """The first op of every module (and phase) that the value reached, in order. A link says which of NaN, +Inf and
    -Inf it holds, NaN before Inf; ``culprit_kind`` is what prevails in the first."""
    table = plain_table("#", "phase", "module", "op", "value", "dtype", right=("#",))
    links = links[:MOST_LINKS]
    ops = [tail(bare(link["op"], width), width // OP_SHARE) for link in links]
    room = max(16, width - 34 - max(map(len, ops), default=0))
    for place, (link, op) in enumerate(zip(links, ops, strict=True), start=1):
        table.add_row(
            str(place),
            link["phase"],
            Text(tail(link["tensor"] or link["module"] or "–", room)),
            op,
            KIND_NAMES[culprit_kind if place == 1 and culprit_kind else link["kind"]],
            dtype(link["dtype"]),
            style="bold red" if place == 1 and culprit_kind else None,
        )
    return table


def operands_table(found: dict[str, Any]) -> Table:
    """What the culprit read and what it wrote."""
    numbers = ("largest |x|", "zeros", "not finite")
    table = plain_table("", "dtype", "shape", *numbers, right=numbers)
    for o in found["operands"]:
        largest = number(o["absmax"]) if o["absmax"] is not None else "none finite"
        shares = [_share(o[what], math.prod(o["shape"])) for what in ("zeros", "nonfinite")]
        table.add_row(Text(o["argument"]), dtype(o["dtype"]), shape(o["shape"]), largest, *shares)
    if out := found["output"]:
        nonfinite = _share(out["nonfinite"], out["numel"])
        table.add_row("→ output", dtype(out["dtype"]), shape(out["shape"]), "", "", nonfinite, style="bold red")
    return table


def kernel_table(rows: Sequence[dict[str, Any]], width: int) -> Table:
    """What ran around the failure; the culprit is marked, and so is what was not finite."""
    table = plain_table("", "name", "phase", "module", "time", "shape", "dtype", right=("time",))
    names = [tail(bare(row["name"], width), width // OP_SHARE) for row in rows]
    shapes = [" ".join(map(shape, row["shapes"])) for row in rows]
    room = max(12, width - 36 - max(map(len, names), default=0) - max(map(len, shapes), default=0))
    for row, name, sizes in zip(rows, names, shapes, strict=True):
        style = "bold red" if row["here"] else "red" if row["nonfinite"] else None
        module, time = Text(tail(row["module"] or "", room)), duration(row["duration_s"])
        table.add_row("→" if row["here"] else "", name, row["phase"], module, time, sizes, dtype(row["dtype"]), style=style)
    return table


def remedy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Changes that were tried from the snapshot, and what each did."""
    columns, numbers = ("change", "outcome", "step time", "memory", "confirms"), ("step time", "memory")
    table = plain_table(*columns, right=numbers, fold=("outcome", "confirms"))
    for row in rows:
        if row["survives"] is None:
            outcome, style = f"not tried: {row['why'] or 'no reason given'}", "dim"
        elif row["survives"]:
            outcome, style = f"survives {count(row['steps'], 'step')}", "green"
        elif row["failed_at"] is None:
            outcome, style = "trains nothing", "red"
        else:
            outcome, style = f"fails again at step {row['failed_at']}", "red"
        ratios = ["–" if row[name] is None else f"{row[name]:.2f}x" for name in ("step_time_ratio", "bytes_ratio")]
        table.add_row(Text(row["change"]), Text(outcome, style=style), *ratios, Text(row["confirms"] or "–"))
    return table


def event_lines(events: Sequence[dict[str, Any]]) -> list[str]:
    """What happened along the way; a scaler's skip with its producer where that was found."""
    lines = []
    for event in events[:MOST_EVENTS]:
        detail = event["detail"]
        first = detail.get("first_nonfinite")
        if event["kind"] == "scaler_skip":
            what = f"loss scaler skipped the update at scale {detail.get('loss_scale', float('nan')):,.0f}"
            if first:
                what += f": {first['phase']}, {first['module'] or 'outside of modules'}, {first['op']}, {first['cause']}"
            elif detail.get("tensor"):
                what += f": gradient of {detail['tensor']} not finite"
        elif event["kind"] == "clip_norm":
            what = f"the norm of clipping overflowed, so every gradient became 0 (their norm: {detail.get('grad_norm'):.4g})"
        else:
            what = f"{event['kind']} " + ", ".join(f"{key} {value}" for key, value in detail.items())
        lines.append(f"step {event['step']}: {what}")
    more = len(events) - MOST_EVENTS
    return [*lines, f"and {more} more (--json has all)"] if more > 0 else lines


def bare(op: str, width: int) -> str:
    """An op's name, without its library where the screen is narrow."""
    return op if width >= WIDE else op.removeprefix("aten.")


def tail(name: str, room: int) -> str:
    """The end of a dotted name, which is what differs between modules."""
    return name if len(name) <= room else "…" + name[-(room - 1) :]


def dtype(name: str) -> str:
    """``fp16`` for ``float16``, as configurations say."""
    limits = float_format(name)
    return limits.name if limits else name


def shape(sizes: Sequence[int]) -> str:
    """``512x128``; a single number is a ``scalar``."""
    return "x".join(map(str, sizes)) or "scalar"


def duration(seconds: float | None) -> str:
    """Microseconds or milliseconds; a dash where the profiler saw none."""
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} us"


def _share(count: int, of: int) -> str:
    if not count:
        return "0"
    share = count / of
    return f"{count:,} ({'100 %' if count == of else f'{min(share, 0.999):.1%}' if share >= 0.001 else '<0.1%'})"
