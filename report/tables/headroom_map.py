"""Headroom of every layer over the steps of the runs that best explain a failure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from report.load import Folder
from report.tables.headroom import headroom
from report.tables.table import Table

LETTER, NAME = "headroom", "headroom"
MOST_RUNS, MOST_MODULES = 2, 32
COLUMNS = ("run_id", "case", "dtype_config", "seed", "step", "module", "order", "direction", "absmax", "headroom_bits")


def table(folder: Folder) -> Table:
    """Forward headroom by module and step of up to two runs: those that diverged come first, and of
    each the modules with the least headroom."""
    runs = sorted(folder.runs, key=lambda run: (run.status != "diverged", run.seed, run.run_id))
    pieces = []
    for run in runs:
        if len(pieces) == MOST_RUNS:
            break
        rows = headroom(folder, run.run_id)
        if rows is not None and len(rows := _tightest(rows)):
            pieces.append(rows.assign(run_id=run.run_id, case=run.case, dtype_config=run.dtype_config, seed=run.seed))
    if not pieces:
        return Table(LETTER, NAME, pd.DataFrame(columns=list(COLUMNS)), "Headroom by layer over steps", "",
                     marks=folder.marks, empty="not measured: no run holds an activations.jsonl.")
    data = pd.concat(pieces, ignore_index=True)[list(COLUMNS)]
    least = data.loc[data["headroom_bits"].idxmin()]
    title = (f"Least headroom: {least['module']} of {least['dtype_config']} on {least['case']}, "
             f"{least['headroom_bits']:.1f} bits below the largest number of its dtype at step {least['step']}.")
    caption = (f"Headroom in bits (doublings) between a module's largest output and the largest number of its dtype, up to "
               f"the {MOST_MODULES} tightest modules of a run, in the order of the forward pass. Diverged runs first.")
    return Table(LETTER, NAME, data, title, caption, marks=folder.marks)


def _tightest(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[(rows["direction"] == "fwd") & np.isfinite(rows["headroom_bits"])]
    least = rows.groupby("module", sort=False)["headroom_bits"].min().nsmallest(MOST_MODULES)
    return rows[rows["module"].isin(least.index)]
