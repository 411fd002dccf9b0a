"""``--to csv``: every table, the rows and the findings. Text that a spreadsheet would run is neutralised."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from instrument.results.contents import Folder
from report.export.rows import findings_frame, runs_frame
from report.plots.write import write_csv
from report.tables import all_tables


def export(folder: Folder, out: Path) -> list[Path]:
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
