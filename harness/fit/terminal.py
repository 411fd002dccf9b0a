"""What a person sees of a search, on standard error."""

from __future__ import annotations

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from instrument.count import count


def trial(found: Any) -> None:
    """A trial is over."""
    words = f"  {count(found.batch, 'row'):>11}: {found.status}"
    if found.peak_bytes is not None:
        words += f", {found.peak_bytes / 1e9:.1f} GB"
    if found.tokens_per_s is not None:
        words += f", {found.tokens_per_s:,.0f} tokens/s"
    print(words + (f" ({found.why})" if found.why else ""), file=sys.stderr, flush=True)


def row(found: dict[str, Any]) -> None:
    """A configuration is done."""
    print(f"{found['case']} {found['config']}: {largest(found)}", file=sys.stderr, flush=True)


def largest(found: dict[str, Any]) -> str:
    """The answer in words."""
    if found["status"] in ("unsupported", "error"):
        return f"{found['status']} ({found['limited_by']})"
    if found["status"] == "none_fits":
        return "not even one row fits"
    return f"{'at least ' if found['status'] == 'at_least' else ''}{count(found['largest_batch'], 'row')}"


def table(case: str, rows: list[dict[str, Any]], price_per_hour: float | None) -> None:
    """All configurations side by side, within 80 columns; what was not measured is a dash."""
    drawn = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{case}: the largest batch that fits, in one forward pass",
        title_justify="left",
    )
    drawn.add_column("configuration", no_wrap=True)
    drawn.add_column("rows\nthat fit", justify="right")
    heads = ["peak\nGB", "tokens\nk/s", "real\nk/s", "real k/s\nat 32"]
    if price_per_hour is not None:
        heads += ["cost\n/10^9", "cost\nat 32"]
    for head in heads:
        drawn.add_column(head, justify="right", no_wrap=True)
    for found in rows:
        small = found.get("at_32") or {}
        cells = [
            _number(found.get("peak_bytes"), 1e9),
            _number(found.get("tokens_per_s"), 1e3),
            _number(found.get("real_tokens_per_s"), 1e3),
            _number(small.get("real_tokens_per_s"), 1e3),
        ]
        if price_per_hour is not None:
            cells += [_number(found[name], 1, 2) for name in ("cost_per_1e9_real_tokens", "cost_per_1e9_real_tokens_at_32")]
        drawn.add_row(found["config"], rows_words(found), *cells)
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(drawn)
    console.print("; ".join(legend(rows, price_per_hour)), style="dim")
    for reason in sorted({f"{found['config']}: {found['limited_by']}" for found in rows if found.get("limited_by")}):
        console.print(reason, soft_wrap=True)


def rows_words(found: dict[str, Any]) -> str:
    """The largest batch, as far as it is known."""
    largest, within = found["largest_batch"], found.get("within_rows")
    if not largest:
        return found["status"].replace("_", " ")
    if found["status"] == "at_least":
        return f"≥ {largest}"
    return f"{largest}–{largest + within - 1}" if within and within > 1 else str(largest)


def legend(rows: list[dict[str, Any]], price_per_hour: float | None) -> list[str]:
    """What the heads, and a range of rows, mean."""
    words = ["k/s: thousand tokens a second", "real: without padding", "at 32: with 32 rows"]
    if price_per_hour is not None:
        words.append("cost: of 10^9 real tokens")
    between = next((found for found in rows if "–" in rows_words(found)), None)
    if between is not None:
        largest = between["largest_batch"]
        words.append(f"{rows_words(between)}: {largest} rows fit, {largest + between['within_rows']} do not")
    return words


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"
