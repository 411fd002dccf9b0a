"""Tables of the section on time: kernel classes, MFU by numerator and denominator, benchmarks, the largest batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import pandas as pd

from instrument.results.schemas import RunRecord
from report.dossier.rows import ABSENT
from report.tables.machine import IDLE
from report.tables.selection import by_cell, series_order
from report.text import bracketed, clean, number, objects, short

DENOMINATORS = {
    "mfu": "the peak of the dtype of each FLOP",
    "mfu_bf16_peak": "the card's bf16 peak",
    "mfu_measured_peak": "the rate measured here",
}
MAX_ROWS = 60
TOP_HEADS = ("case", "configuration", "kernel", "class", "phase", "calls a step", "ms a step", "inputs")
KERNEL_HEADS = ("op", "case", "way", "status", "time (us)", "time over ours", "GB/s", "share of copy", "pairs", "note")
KERNEL_FIELDS = ("op", "case", "arm", "status", "time_s", "time_over_ours", "bytes_per_s", "share_of_copy", "pairs", "note")
KERNEL_UNITS = {"time_s": 1e6, "bytes_per_s": 1e-9}
"""Field of ``kernels.json`` -> how many of the printed unit make one of its own."""
OVERHEAD_HEADS = ("arm", "step time, ratio to bare", "processor time, ratio", "aim", "", "n", "note")
FIT_HEADS = tuple(
    "case, configuration, tokens a row, rows, within, peak GB, tokens/s, real tokens/s, at 32 rows, cost of 10⁹ real "
    "tokens, at 32 rows, the next batch met".split(", ")
)


def mfu_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A table for each denominator that was measured: a row a configuration, a column a case, in per cent the median over seeds
    of all tokens, and of real ones where padding makes them fewer."""
    cells = by_cell(runs)
    cases = list(dict.fromkeys(case for case, _ in cells))
    tables = []
    for field, name in DENOMINATORS.items():
        found = {key: text for key, group in cells.items() if (text := _utilisation(group, field))}
        configs = series_order({config for _, config in found})
        rows = [[clean(config), *(found.get((case, config), ABSENT) for case in cases)] for config in configs]
        if rows:
            tables.append({"name": name, "heads": ["configuration", *map(clean, cases)], "rows": rows})
    return tables


def _utilisation(group: Sequence[RunRecord], field: str) -> str | None:
    every, real = (
        [v for run in group if (v := getattr(run, field + tokens)) is not None and math.isfinite(v)]
        for tokens in ("", "_real_tokens")
    )
    if not every:
        return None
    text = f"{100 * median(every):.1f}"
    return text if not real or f"{100 * median(real):.1f}" == text else f"{text} (real {100 * median(real):.1f})"


def kernel_classes(data: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: milliseconds of a step by class of kernel with the share of all kernel time, a row a case
    and configuration; idle time, which is no kernel's, in milliseconds only. Both empty without a profile."""
    classes = list(dict.fromkeys(data["class"]))
    rows = []
    for (case, config), profile in data.groupby(["case", "dtype_config"], sort=False):
        seconds = profile.groupby("class", sort=False)["seconds_per_step"].sum()
        total = seconds.drop(IDLE, errors="ignore").sum()
        rows.append([clean(case), clean(config), *(_share(name, seconds, total) for name in classes)])
    return [clean(name, 30) for name in classes], rows


def _share(name: str, seconds: pd.Series, total: float) -> str:
    if name not in seconds:
        return ABSENT
    time = short(1e3 * seconds[name])
    return time if name == IDLE or not total else f"{time} ({100 * seconds[name] / total:.0f} %)"


def top_kernels(top: pd.DataFrame) -> list[list[str]]:
    """The kernels that took longest of each profile (`report.tables.machine.TOP`)."""
    return [
        [
            clean(row["case"], 40),
            clean(row["dtype_config"], 40),
            *(clean(row[key] if isinstance(row[key], str) else "", 90) or ABSENT for key in ("name", "class", "phase")),
            ABSENT if pd.isna(row["calls_per_step"]) else short(row["calls_per_step"]),
            short(1e3 * row["seconds_per_step"]),
            _shapes(row["input_shapes"]),
        ]
        for row in top.to_dict("records")
    ]


def _shapes(shapes: object) -> str:
    if not isinstance(shapes, list) or not shapes:
        return ABSENT
    return clean(", ".join(clean(str(shape), 40) for shape in shapes[:3]) + (" ..." if len(shapes) > 3 else ""), 90)


def overhead_rows(ratios: pd.DataFrame) -> list[list[str]]:
    """The ratios to the bare loop (`report.tables.machine.RATIO_COLUMNS`) as text."""
    return [
        [
            clean(row["arm"], 60),
            _interval(row, ""),
            _interval(row, "cpu_"),
            f"at most {row['at_most']:g}" if known else "none",
            ("met" if row["ratio"] <= row["at_most"] else "missed") if known else ABSENT,
            ABSENT if math.isnan(row["n"]) else f"{row['n']:.0f}",
            clean(row["note"] or "", 200),
        ]
        for row in ratios.head(MAX_ROWS).to_dict("records")
        for known in [math.isfinite(row["at_most"] - row["ratio"])]
    ]


def _interval(row: dict, kind: str) -> str:
    value, low, high = (row[f"{kind}{name}"] for name in ("ratio", "low", "high"))
    return ABSENT if math.isnan(value) else f"{value:.3f}{bracketed(low, high, '.3f')}"


def kernel_rows(document: dict | None) -> list[list[str]]:
    """The rows of ``kernels.json`` by ``KERNEL_FIELDS``."""
    rows = objects((document or {}).get("rows"))[:MAX_ROWS]
    return [[_printed(row.get(field), KERNEL_UNITS.get(field, 1.0)) for field in KERNEL_FIELDS] for row in rows]


def _printed(value: object, scale: float) -> str:
    if value is None or value == []:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value * scale) if isinstance(value, int | float) else clean(value, 160)


def fit_rows(document: dict | None, price_per_hour: float | None = None) -> list[list[str]]:
    """A row a search. ``price_per_hour`` gives costs, at the largest batch and at 32 rows; without it they are absent."""
    return [_row(row, price_per_hour) for row in objects((document or {}).get("rows"))[:MAX_ROWS]]


def _row(row: dict[str, Any], price_per_hour: float | None) -> list[str]:
    small = row.get("at_32") if isinstance(row.get("at_32"), dict) else {}
    real, real_small = _positive(row.get("real_tokens_per_s")), _positive(small.get("real_tokens_per_s"))
    peak = _positive(row.get("peak_bytes"))
    seq_len, within, tokens = (_fit_number(_positive(row.get(name))) for name in ("seq_len", "within_rows", "tokens_per_s"))
    return [
        clean(row.get("case"), 40),
        clean(row.get("config"), 40),
        seq_len,
        _largest(row),
        within,
        _fit_number(peak and peak / 1e9),
        tokens,
        _fit_number(real),
        _fit_number(real_small),
        _cost(real, price_per_hour),
        _cost(real_small, price_per_hour),
        clean(row.get("limited_by") or ABSENT, 160),
    ]


def _largest(row: dict[str, Any]) -> str:
    batch = _positive(row.get("largest_batch"))
    if batch is None:
        return clean(str(row.get("status")).replace("_", " "), 40)
    return ("≥ " if row.get("status") == "at_least" else "") + f"{batch:.0f}"


def _cost(rate: float | None, price_per_hour: float | None) -> str:
    return ABSENT if not rate or price_per_hour is None else f"{price_per_hour / 3600 * 1e9 / rate:.2f}"


def _fit_number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}" if value >= 1000 else short(value)


def _positive(value: object) -> float | None:
    known = number(value)
    return known if known is not None and known >= 0 else None
