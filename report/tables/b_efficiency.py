"""B: model-FLOPs utilisation over peak memory, with the frontier of each case."""

from __future__ import annotations

import math

import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.statistics import NOTHING, mean_interval
from report.tables.cells import COMPLETED, FAILING, MEMORY, Cell, memory_kind, peak_of, shares_process
from report.tables.choice import all_cells
from report.tables.selection import by_cell, is_control, select, series_order
from report.tables.speed import FIELD, NOT_MEASURED, eligible, y_kind
from report.tables.table import Table, data_text, frame, identity
from report.text import sentence, shortened

COLUMNS = tuple(
    "case column arch dtype_config state n peak_bytes peak_least_bytes peak_most_bytes peak_kind mfu_bf16_peak y_kind "
    "mfu_own low high on_frontier run_ids".split()
)


def table(folder: Folder) -> Table:
    """One row a case and configuration, controls left out: nobody would choose them. ``mfu_bf16_peak`` holds the MFU that
    ``y_kind`` names."""
    cells = all_cells(folder)
    entered, excluded = eligible(folder, select(folder))
    runs = [run for run in entered if not is_control(run.dtype_config)]
    kind = y_kind(runs)
    memory = memory_kind(runs)
    rows = [_row(cell, kind, memory, cells[key]) for key, cell in by_cell(runs).items()]
    data = _with_frontier(frame([row for row in rows if row is not None], COLUMNS))
    empty = None if not data.empty else NOT_MEASURED if kind is None and runs else "no completed run has enough timed steps"
    title, caption = _title(data, cells, empty), _caption(folder, runs, kind, memory)
    return Table("B", "b_efficiency_frontier", data, title, caption, excluded=excluded, marks=folder.marks, empty=empty)


def _row(runs: list[RunRecord], kind: str | None, memory: str | None, cell: Cell) -> dict | None:
    values = [value for run in runs if kind and (value := getattr(run, FIELD[kind])) is not None]
    peaks = [getattr(run, MEMORY[memory]) for run in runs] if memory else []
    if not values or not peaks:
        return None
    mfu = mean_interval(values)
    own = [run.mfu for run in runs if run.mfu is not None]
    shared = any(shares_process(run) for run in runs)
    return identity(runs[0]) | {
        "state": "poor" if cell.poor else cell.state if cell.state in (COMPLETED, FAILING) else "unjudged",
        "n": len(runs),
        "peak_bytes": peak_of(runs, memory),
        "peak_least_bytes": math.nan if shared else min(peaks),
        "peak_most_bytes": math.nan if shared else max(peaks),
        "peak_kind": memory,
        "mfu_bf16_peak": mfu.value,
        "y_kind": kind,
        "mfu_own": (mean_interval(own) if own else NOTHING).value,
        "low": mfu.low,
        "high": mfu.high,
        "on_frontier": False,
        "run_ids": " ".join(run.run_id for run in runs),
    }


def _with_frontier(data: pd.DataFrame) -> pd.DataFrame:
    """Mark the rows that no other judged row of their case beats in both; equals stay."""
    data["on_frontier"] = False
    for _, rows in data[data["state"] == "completed"].groupby("case"):
        for index, row in rows.iterrows():
            no_worse = (rows["peak_bytes"] <= row["peak_bytes"]) & (rows["mfu_bf16_peak"] >= row["mfu_bf16_peak"])
            better = (rows["peak_bytes"] < row["peak_bytes"]) | (rows["mfu_bf16_peak"] > row["mfu_bf16_peak"])
            data.loc[index, "on_frontier"] = not (no_worse & better).any()
    return data


def _title(data: pd.DataFrame, cells: dict[tuple[str, str], Cell], empty: str | None) -> str:
    """Whose frontier has a single configuration, and how high MFU gets."""
    if empty:
        return "Not decided: no MFU to compare."
    top = data.loc[data["mfu_bf16_peak"].idxmax()]
    highest = f"highest MFU is {100 * top['mfu_bf16_peak']:.0f} % of the {top['y_kind']} ({top['dtype_config']}, {top['case']})"
    frontier = data[data["on_frontier"]]
    if frontier.empty:
        return sentence(f"{highest}; no case has a healthy reference, so no frontier is drawn")
    alone = frontier.groupby("case").filter(lambda rows: len(rows) == 1)["dtype_config"].value_counts()
    cases = frontier["case"].nunique()
    alone_in = [f"{config} alone is the frontier in {n} of {count(cases, 'case')}" for config, n in alone.items()]
    if alone_in:
        alone_in[0] = f"by mean values {alone_in[0]}"  # P2 says what the seeds resolve
    trades = f"by mean values every frontier trades speed for memory ({shortened(series_order(frontier['dtype_config']))})"
    drawn = set(frontier["case"])
    lost = sum(cell.n_failed > 0 and case in drawn and not is_control(config) for (case, config), cell in cells.items())
    among = [f"of what finished: {count(lost, 'cell')} with a failure {'is' if lost == 1 else 'are'} not drawn"] if lost else []
    return sentence("; ".join([*(alone_in or [trades]), *among, highest]))


def _caption(folder: Folder, runs: list[RunRecord], kind: str | None, memory: str | None) -> str:
    measure = {
        "allocated": "peak memory that the allocator handed out, the largest of the seeds",
        "rss": "peak resident memory of the process (there is no GPU)",
        None: "not measured",
    }[memory]
    if any(shares_process(run) for run in runs):
        measure += (
            "; runs shared a process and did not free all memory, so the smallest of the seeds is drawn, without interval"
        )
    against = {
        "bf16 peak": "against the card's dense bf16 peak",
        "measured peak": "against the matmul rate measured on this machine (a CPU or an unknown card has no datasheet peak)",
        None: "not measured",
    }[kind]
    return (
        f"{data_text(folder, runs)} Filled: MFU {against}, mean and 95 % t-interval over seeds. Hollow: against the peak "
        "of the dtype that each FLOP ran in, which flatters fp32. Memory: "
        f"{measure}. Frontier: no other configuration of the case is as fast with less memory; poor or unjudged "
        "configurations are not on it, and controls are left out."
    )
