"""``--to bencher``: Bencher Metric Format, for tracking over time (bencher.dev/docs/reference/bencher-metric-format)."""

from __future__ import annotations

import json
import math
from pathlib import Path

from instrument.results.contents import Folder
from instrument.results.files import replace
from report.tables import b_efficiency, c_throughput

MEASURES = {
    "samples_per_s": ("C", "samples_per_s", None, None),
    "speed_over_fp32_true": ("C", "relative", "low", "high"),
    "mfu": ("B", "mfu_bf16_peak", "low", "high"),
    "peak_bytes": ("B", "peak_bytes", None, None),
}
"""Measure -> table, column, and the columns of its interval."""


def export(folder: Folder, out: Path) -> list[Path]:
    """``bencher.json``: ``{"device/case/configuration": {measure: {value, lower_value, upper_value}}}``."""
    path = out / "bencher.json"
    replace(path, json.dumps(metrics(folder), indent=1, allow_nan=False).encode() + b"\n")
    return [path]


def metrics(folder: Folder) -> dict[str, dict[str, dict[str, float]]]:
    """Every measured figure; what was not measured is absent."""
    tables = {"C": c_throughput.table(folder).data, "B": b_efficiency.table(folder).data}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, (letter, column, low, high) in MEASURES.items():
        for row in tables[letter].to_dict("records"):
            name = f"{folder.device}/{row['case']}/{row['dtype_config']}"
            metric = {
                key: float(row[field])
                for key, field in (("value", column), ("lower_value", low), ("upper_value", high))
                if field is not None and math.isfinite(row[field])
            }
            if "value" in metric:
                found.setdefault(name, {})[measure] = metric
    return found
