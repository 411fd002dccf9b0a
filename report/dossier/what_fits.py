"""The largest batches (fit.json) as a table's words: people rent memory, and choose at the batch that fills it."""

from __future__ import annotations

from typing import Any

from report.dossier.measurements import ABSENT, MAX_ROWS
from report.plots.text import clean, short

HEADS = (
    "case",
    "configuration",
    "tokens a row",
    "rows",
    "within",
    "peak GB",
    "tokens/s",
    "real tokens/s",
    "at 32 rows",
    "cost of 10⁹ real tokens",
    "at 32 rows",
    "the next batch met",
)


def fit_rows(document: dict | None, price_per_hour: float | None = None) -> list[list[str]]:
    """A row a search. ``price_per_hour`` gives costs, at the largest batch and at 32 rows; without it they are absent."""
    rows = (document or {}).get("rows")
    if not isinstance(rows, list):
        return []
    return [_row(row, price_per_hour) for row in rows[:MAX_ROWS] if isinstance(row, dict)]


def _row(row: dict[str, Any], price_per_hour: float | None) -> list[str]:
    small = row.get("at_32") if isinstance(row.get("at_32"), dict) else {}
    real, real_small = _number(row.get("real_tokens_per_s")), _number(small.get("real_tokens_per_s"))
    peak = _number(row.get("peak_bytes"))
    seq_len, within, tokens = (_printed(_number(row.get(name))) for name in ("seq_len", "within_rows", "tokens_per_s"))
    return [
        clean(row.get("case"), 40),
        clean(row.get("config"), 40),
        seq_len,
        _largest(row),
        within,
        _printed(peak and peak / 1e9),
        tokens,
        _printed(real),
        _printed(real_small),
        _cost(real, price_per_hour),
        _cost(real_small, price_per_hour),
        clean(row.get("limited_by") or ABSENT, 160),
    ]


def _largest(row: dict[str, Any]) -> str:
    batch = _number(row.get("largest_batch"))
    if batch is None:
        return clean(str(row.get("status")).replace("_", " "), 40)
    return ("≥ " if row.get("status") == "at_least" else "") + f"{batch:.0f}"


def _cost(rate: float | None, price_per_hour: float | None) -> str:
    return ABSENT if not rate or price_per_hour is None else f"{price_per_hour / 3600 * 1e9 / rate:.2f}"


def _printed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}" if value >= 1000 else short(value)


def _number(value: Any) -> float | None:
    """A finite number that is not negative, or None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if known else None
