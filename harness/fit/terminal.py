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
    """All configurations side by side; what was not measured is a dash."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left",
                  title=f"{case}: the largest batch that fits, in one forward pass", title_justify="left")
    drawn.add_column("configuration", no_wrap=True)
    heads = ["rows", "within", "peak GB", "tokens/s", "real/s", "at 32 rows"]
    if price_per_hour is not None:
        heads += ["cost", "at 32 rows"]
    for head in heads:
        drawn.add_column(head, justify="right")
    for found in rows:
        small = found.get("at_32") or {}
        rows_ = f"{'≥ ' if found['status'] == 'at_least' else ''}{found['largest_batch']}"
        cells = [rows_ if found["largest_batch"] else found["status"].replace("_", " "), _number(found.get("within_rows"), "d"),
                 _number(found.get("peak_bytes") and found["peak_bytes"] / 1e9, ".1f"),
                 _number(found.get("tokens_per_s"), ",.0f"), _number(found.get("real_tokens_per_s"), ",.0f"),
                 _number(small.get("real_tokens_per_s"), ",.0f")]
        if price_per_hour is not None:
            cells += [_number(found[name], ",.2f") for name in ("cost_per_1e9_real_tokens", "cost_per_1e9_real_tokens_at_32")]
        drawn.add_row(found["config"], *cells)
    reasons = {f"{found['config']}: {found['limited_by']}" for found in rows if found.get("limited_by")}
    drawn.caption = "; ".join(["real/s: unpadded tokens a second", *(["cost: of 10^9 real tokens"] if price_per_hour else []),
                               "within: the next batch that does not fit is so many rows larger"])
    console = Console(stderr=True, highlight=False)
    console.print(drawn)
    for reason in sorted(reasons):
        console.print(reason, markup=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
