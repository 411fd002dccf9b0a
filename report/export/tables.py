"""``--to csv`` (every table, the rows and the findings) and ``--to bencher`` (Bencher Metric Format)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from instrument.results.contents import Folder
from instrument.results.files import replace
from instrument.results.schemas import RunRecord
from report.hypotheses import judge
from report.plots.write import write_csv
from report.tables import all_tables, b_efficiency, c_throughput

NESTED = ("env", "config", "flags", "nonfinite", "first_nonfinite")
MEASURES = {
    "samples_per_s": ("C", "samples_per_s", None, None),
    "speed_over_fp32_true": ("C", "relative", "low", "high"),
    "mfu": ("B", "mfu_bf16_peak", "low", "high"),
    "peak_bytes": ("B", "peak_bytes", None, None),
}
"""Measure -> table, column, and the columns of its interval."""


def runs_frame(folder: Folder) -> pd.DataFrame:
    """One row a run: the flat fields of its record, and where its first non-finite value was."""
    fields = [field for field in RunRecord.__struct_fields__ if field not in NESTED]
    rows = []
    for run in folder.runs:
        first = run.first_nonfinite
        place = {
            f"first_nonfinite_{name}": getattr(first, name) if first else None
            for name in ("phase", "module", "tensor", "kind", "cause")
        }
        rows.append({field: getattr(run, field) for field in fields} | place)
    return pd.DataFrame(rows)


def findings_frame(folder: Folder) -> pd.DataFrame:
    """One row a hypothesis or claim; the rows that it rests on as one cell."""
    rows = [
        {
            name: getattr(finding, name)
            for name in ("id", "claim", "verdict", "sentence", "effect", "low", "high", "unit", "n", "would_decide", "plot")
        }
        | {"run_ids": " ".join(finding.run_ids)}
        for finding in judge(folder)
    ]
    return pd.DataFrame(rows)


def export_csv(folder: Folder, out: Path) -> list[Path]:
    """``<table>.csv`` and ``<table>_summary.csv`` for A to H, ``runs.csv``, ``findings.csv``."""
    frames: dict[str, pd.DataFrame] = {"runs": runs_frame(folder), "findings": findings_frame(folder)}
    for table in all_tables(folder).values():
        frames[table.name] = table.data
        if len(table.summary.columns):
            frames[f"{table.name}_summary"] = table.summary
    paths = [out / f"{name}.csv" for name in frames]
    for path, frame in zip(paths, frames.values(), strict=True):
        write_csv(frame, path)
    return paths


def export_bencher(folder: Folder, out: Path) -> list[Path]:
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
