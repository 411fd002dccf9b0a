"""Where the time goes, as tables: kernel classes, MFU by numerator and denominator, benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from instrument.records import RunRecord
from report.dossier.citations import in_order
from report.plots.text import clean, short

ABSENT = "–"
DENOMINATORS = (("own dtype's peak", "mfu"), ("bf16 peak", "mfu_bf16_peak"), ("measured peak", "mfu_measured_peak"))
MAX_ROWS = 60


def mfu_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Case, configuration, and the six MFUs (three denominators x all and real tokens), in per cent:
    medians over seeds. Rows without any are left out."""
    fields = [field + tokens for _, field in DENOMINATORS for tokens in ("", "_real_tokens")]
    rows = []
    for (case, config), group in _groups(runs).items():
        values = [[v for run in group if (v := getattr(run, field)) is not None and math.isfinite(v)] for field in fields]
        if any(values):
            rows.append([clean(case), clean(config), *(f"{100 * median(v):.1f}" if v else ABSENT for v in values)])
    return rows


def kernel_classes(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: share of kernel time by class of kernel, per case and configuration, of the
    first run that has a profile. Both empty when none has."""
    found = {}
    for (case, config), group in _groups(runs).items():
        profile = next((run.flags["time_by_kernel"] for run in group if run.flags.get("time_by_kernel")), None)
        seconds = _numbers(profile)
        if seconds:
            found[case, config] = seconds
    classes = list(dict.fromkeys(name for seconds in found.values() for name in seconds))
    rows = []
    for (case, config), seconds in found.items():
        total = sum(seconds.values())
        shares = [f"{100 * seconds[name] / total:.1f}" if name in seconds and total else ABSENT for name in classes]
        rows.append([clean(case), clean(config), *shares])
    return [clean(name) for name in classes], rows


def _numbers(profile: object) -> dict[str, float]:
    """Seconds by class: plain numbers, or objects that carry ``time_s``."""
    if not isinstance(profile, dict):
        return {}
    values = {name: value.get("time_s") if isinstance(value, dict) else value for name, value in profile.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and value >= 0}


def bench_table(document: dict | None, columns: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Rows of a benchmark's JSON (``{"rows": [{...}]}``) by column: (field, how it is printed)."""
    rows = (document or {}).get("rows")
    if not isinstance(rows, list):
        return []
    return [[_printed(row.get(field), kind) for field, kind in columns] for row in rows[:MAX_ROWS] if isinstance(row, dict)]


def _printed(value: object, kind: str) -> str:
    if value is None or value == []:
        return ABSENT
    if kind == "interval" and isinstance(value, (list, tuple)):
        return " to ".join(short(float(v)) for v in value if isinstance(v, (int, float)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return clean(value, 160)
    scaled = {"us": 1e6, "ms": 1e3, "percent": 100, "GB/s": 1e-9}.get(kind, 1.0)
    return short(value * scaled)


def _groups(runs: Sequence[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in in_order(runs):
        groups.setdefault((run.case, run.dtype_config), []).append(run)
    return groups
