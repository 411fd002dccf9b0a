"""Headroom of every layer over steps: how many doublings its largest value is from its dtype's largest number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from kernels.float_formats import float_format
from report.tables.table import Table
from report.text import objects

NAME = "headroom"
MOST_RUNS, MOST_MODULES = 2, 10
FEWEST_WINDOWS = 3
"""Fewer columns than these show no development."""
COLUMNS = ("run_id", "case", "dtype_config", "seed", "step", "module", "order", "direction", "absmax", "headroom_bits")
READ_COLUMNS = ("step", "module", "order", "direction", "dtype", "absmax", "headroom_bits", "underflow_frac")


def headroom(folder: Folder, run_id: str) -> pd.DataFrame | None:
    """One row a read window and module, or None when activations were not recorded.

    ``headroom_bits`` is log2(largest number of the dtype / absmax): 0 at the edge, nan for a dtype that is not known, inf for a
    module that gave zeros only. A row that lacks something is left out."""
    rows = [row for read in folder.activations(run_id) if (row := headroom_row(read)) is not None]
    if not rows:
        return None
    data = pd.DataFrame(rows, columns=list(READ_COLUMNS))
    return data.sort_values(["step", "order"], kind="stable", ignore_index=True)


def headroom_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """One reading with its headroom; None when it lacks a step, a module, an order or a direction."""
    try:
        absmax = row.get("absmax")
        absmax = math.nan if absmax is None else float(absmax)
        return {
            "step": int(row["step"]),
            "module": str(row["module"]),
            "order": int(row["order"]),
            "direction": str(row["direction"]),
            "dtype": row.get("dtype"),
            "absmax": absmax,
            "headroom_bits": _bits(row.get("dtype"), absmax),
            "underflow_frac": row.get("flush_frac"),
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _bits(dtype: str | None, absmax: float) -> float:
    known = float_format(dtype)
    largest = known.max if known else math.nan
    with np.errstate(divide="ignore"):
        return float(np.log2(largest) - np.log2(absmax)) if not math.isnan(absmax) else math.nan


def table(folder: Folder) -> Table:
    """Forward headroom by module and step of up to two runs, and of each the modules with the least: runs that
    overflowed in the forward pass come first, then runs in fp16 by how little headroom they had."""
    pieces = _chosen(folder)
    if not pieces:
        return Table.without_data(NAME, COLUMNS, "Headroom by layer over steps", _why_empty(folder), folder.marks)
    data = pd.concat(pieces, ignore_index=True)[list(COLUMNS)]
    caption = (
        f"Headroom in bits (doublings) between a module's largest output and the largest number of its dtype, up to "
        f"the {MOST_MODULES} tightest modules of a run, in the order of the forward pass; a column a step at which "
        f"magnitudes were read. Shown: runs that overflowed in the forward pass, else runs in fp16 with at least "
        f"{FEWEST_WINDOWS} columns, the tightest first."
    )
    return Table(NAME, NAME, data, _title(folder, data), caption, marks=folder.marks)


def cells(run: pd.DataFrame) -> pd.DataFrame:
    """One run's rows of the table as a heat map: modules down in the order of the forward pass, steps across, bits."""
    order = run.drop_duplicates("module").sort_values("order")["module"]
    return run.pivot_table(index="module", columns="step", values="headroom_bits", aggfunc="min").loc[order]


def _chosen(folder: Folder) -> list[pd.DataFrame]:
    """The runs to show. One seed a case and configuration is looked at: reading all of a campaign would take long."""
    first: dict[tuple[str, str], RunRecord] = {}
    for run in sorted(folder.runs, key=lambda run: (not _overflowed(run), run.seed, run.run_id)):
        if folder.activations(run.run_id):
            first.setdefault((run.case, run.dtype_config), run)
    found = []
    for run in sorted(first.values(), key=_rank):
        if len(found) >= MOST_RUNS and _rank(run) > found[-1][0]:
            break  # the classes of runs come in order, and this one is not needed any more
        rows = headroom(folder, run.run_id)
        if rows is None or not len(rows := _tightest(_with_history(folder, run, rows))):
            continue
        if rows["step"].nunique() >= (FEWEST_WINDOWS - 1 if _overflowed(run) else FEWEST_WINDOWS):
            named = rows.assign(run_id=run.run_id, case=run.case, dtype_config=run.dtype_config, seed=run.seed)
            found.append((_rank(run), float(rows["headroom_bits"].min()), run.run_id, named))
    if any(rank < 2 for rank, *_ in found):
        found = [piece for piece in found if piece[0] < 2]  # beside fp16, a wider range explains nothing
    found.sort(key=lambda piece: piece[:3])
    return [named for *_, named in found[:MOST_RUNS]]


def _with_history(folder: Folder, run: RunRecord, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``activations.jsonl``, and those that the replay read of the module that produced the non-finite value:
    the run reads its modules in rotation, and may not have read that one in its last steps."""
    first = run.first_nonfinite
    place = rows.loc[rows["module"] == first.module, "order"] if first else []
    if not len(place):
        return rows
    read = {(row.step, row.module) for row in rows[rows["direction"] == "fwd"].itertuples()}
    given = {"module": first.module, "order": int(place.iloc[0]), "direction": "fwd", "dtype": first.dtype}
    found = [
        headroom_row({"step": row.get("step"), "absmax": row.get("absmax_fwd"), **given})
        for row in objects(folder.forensics(run.run_id).get("history"))
        if row.get("module") == first.module
    ]
    more = [row for row in found if row is not None and (row["step"], row["module"]) not in read]
    return pd.concat([rows, pd.DataFrame(more)], ignore_index=True) if more else rows


def _overflowed(run: RunRecord) -> bool:
    """Whether it diverged by a value that left its dtype's range in the forward pass."""
    first = run.first_nonfinite
    return run.status == "diverged" and first is not None and first.cause == "overflow" and first.phase in ("forward", "loss")


def _rank(run: RunRecord) -> int:
    """Runs with a lower rank explain more."""
    if _overflowed(run):
        return 0
    return 1 if getattr(DTYPE_CONFIGS.get(run.dtype_config), "compute", None) == "fp16" else 2


def _why_empty(folder: Folder) -> str:
    if not any(folder.activations(run.run_id) for run in folder.runs):
        return "not measured: no run holds an activations.jsonl."
    return f"no run holds the outputs' magnitudes at {FEWEST_WINDOWS} steps or more, of modules in a known dtype."


def _title(folder: Folder, data: pd.DataFrame) -> str:
    """The module with the least headroom, how it got there, and whether the run overflowed."""
    least = data.loc[data["headroom_bits"].idxmin()]
    own = data[(data["run_id"] == least["run_id"]) & (data["module"] == least["module"])]
    before = own.loc[own["step"].idxmin()]
    came = f", down from {before['headroom_bits']:.1f} at step {before['step']:.0f}" if before["step"] < least["step"] else ""
    run = folder.by_id[least["run_id"]]
    overflow = f"; the run overflows at step {run.divergence_step}" if _overflowed(run) else ""
    return (
        f"Least headroom: {least['module']} of {least['dtype_config']} on {least['case']}, "
        f"{least['headroom_bits']:.1f} bits at step {least['step']:.0f}{came}{overflow}."
    )


def _tightest(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[(rows["direction"] == "fwd") & np.isfinite(rows["headroom_bits"])]
    least = rows.groupby("module", sort=False)["headroom_bits"].min().nsmallest(MOST_MODULES)
    return rows[rows["module"].isin(least.index)]
