"""Rows and findings as frames, for the formats that take tables."""

from __future__ import annotations

import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.hypotheses import judge

NESTED = ("env", "config", "flags", "nonfinite", "first_nonfinite")


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
