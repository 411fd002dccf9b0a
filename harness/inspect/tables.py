"""The tables of an inspected run. No reading and no arithmetic beyond formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from harness.inspect.chart import number
from harness.inspect.findings import KIND_WORDS
from instrument.count import count

MOST_LINKS, MOST_EVENTS = 12, 8
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
WIDE = 100
"""Columns from which there is room for an op's whole name."""
OP_SHARE = 4
"""An op's name takes at most this part of the width; its end is shown."""


def plain_table(*columns: str, right: Sequence[str] = (), fold: Sequence[str] = ()) -> Table:
    """A borderless table; ``fold`` names the columns that may break."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name not in fold,
            overflow="fold" if name in fold else "ellipsis",
        )
    return table


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
            KIND_WORDS[culprit_kind if place == 1 and culprit_kind else link["kind"]],
            dtype(link["dtype"]),
            style="bold red" if place == 1 and culprit_kind else None,
        )
    return table


def operands_table(found: dict[str, Any]) -> Table:
    """What the culprit read and what it wrote."""
    numbers = ("largest |x|", "zeros", "not finite")
    table = plain_table("", "dtype", "shape", *numbers, right=numbers)
    for o in found["operands"]:
        elements = _numel(o["shape"])
        table.add_row(
            Text(o["argument"]),
            dtype(o["dtype"]),
            shape(o["shape"]),
            number(o["absmax"]) if o["absmax"] is not None else "none finite",
            _share(o["zeros"], elements),
            _share(o["nonfinite"], elements),
        )
    out = found["output"]
    if out:
        table.add_row(
            "→ output",
            dtype(out["dtype"]),
            shape(out["shape"]),
            "",
            "",
            _share(out["nonfinite"], out["numel"]),
            style="bold red",
        )
    return table


def kernel_table(rows: Sequence[dict[str, Any]], width: int) -> Table:
    """What ran around the failure; the culprit is marked, and so is what was not finite."""
    table = plain_table("", "name", "phase", "module", "time", "shape", "dtype", right=("time",))
    names = [tail(bare(row["name"], width), width // OP_SHARE) for row in rows]
    shapes = [" ".join(map(shape, row["shapes"])) for row in rows]
    room = max(12, width - 36 - max(map(len, names), default=0) - max(map(len, shapes), default=0))
    for row, name, sizes in zip(rows, names, shapes, strict=True):
        module = row["module"] or ""
        style = "bold red" if row["here"] else "red" if row["nonfinite"] else None
        table.add_row(
            "→" if row["here"] else "",
            name,
            row["phase"],
            Text(tail(module, room)),
            time_words(row["duration_s"]),
            sizes,
            dtype(row["dtype"]),
            style=style,
        )
    return table


def remedy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Changes that were tried from the snapshot, and what each did."""
    table = plain_table(
        "change", "outcome", "step time", "memory", "confirms", right=("step time", "memory"), fold=("outcome", "confirms")
    )
    for row in rows:
        if row["survives"] is None:
            outcome, style = f"not tried: {row['why'] or 'no reason given'}", "dim"
        elif row["survives"]:
            outcome, style = f"survives {count(row['steps'], 'step')}", "green"
        else:
            outcome, style = f"fails again at step {row['failed_at']}", "red"
        table.add_row(
            Text(row["change"]),
            Text(outcome, style=style),
            _times(row["step_time_ratio"]),
            _times(row["bytes_ratio"]),
            Text(row["confirms"] or "–"),
        )
    return table


def event_lines(events: Sequence[dict[str, Any]]) -> list[str]:
    """What happened along the way; a scaler's skip with its producer where that was found."""
    lines = []
    for event in events[:MOST_EVENTS]:
        detail = event["detail"]
        first = detail.get("first_nonfinite")
        if event["kind"] == "scaler_skip":
            words = f"loss scaler skipped the update at scale {detail.get('loss_scale', float('nan')):,.0f}"
            if first:
                words += f": {first['phase']}, {first['module'] or 'outside of modules'}, {first['op']}, {first['cause']}"
            elif detail.get("tensor"):
                words += f": gradient of {detail['tensor']} not finite"
        else:
            words = f"{event['kind']} " + ", ".join(f"{key} {value}" for key, value in detail.items())
        lines.append(f"step {event['step']}: {words}")
    more = len(events) - MOST_EVENTS
    return [*lines, f"and {more} more (--json has all)"] if more > 0 else lines


def bare(op: str, width: int) -> str:
    """An op's name, without its library where the screen is narrow."""
    return op if width >= WIDE else op.removeprefix("aten.")


def tail(name: str, room: int) -> str:
    """The end of a dotted name, which tells modules apart."""
    return name if len(name) <= room else "…" + name[-(room - 1) :]


def dtype(name: str) -> str:
    """``fp16`` for ``float16``, as configurations say."""
    return DTYPES.get(name, name)


def shape(sizes: Sequence[int]) -> str:
    """``512x128``; a single number is a ``scalar``."""
    return "x".join(map(str, sizes)) or "scalar"


def time_words(seconds: float | None) -> str:
    """Microseconds or milliseconds; a dash where the profiler saw none."""
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} us"


def _numel(sizes: Sequence[int]) -> int:
    elements = 1
    for size in sizes:
        elements *= size
    return elements


def _share(count: int, of: int) -> str:
    if not count:
        return "0"
    share = count / of
    return f"{count:,} ({'100 %' if count == of else f'{min(share, 0.999):.1%}' if share >= 0.001 else '<0.1%'})"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"
