"""C: samples per second relative to fp32_true of the same case and seed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.cells import Cell
from report.tables.choice import all_cells
from report.tables.judgement import divergence_text
from report.tables.selection import REFERENCE, TASK_COLUMNS, by_cell, column_of, is_control, select, series_order
from report.tables.speed import eligible
from report.tables.table import Table, data_text, frame, identity
from report.text import sentence, shortened, span

COLUMNS = ("case", "column", "arch", "dtype_config", "n", "relative", "low", "high", "samples_per_s", "word", "run_ids")


def table(folder: Folder) -> Table:
    """One row a case and configuration: a bar with its paired interval, or a word."""
    selection = select(folder)
    _, excluded = eligible(folder, selection)
    cells, reasons = all_cells(folder), dict(excluded)
    runs = sorted(by_cell(selection.runs).items(), key=lambda item: TASK_COLUMNS.index(column_of(item[1][0])))
    data = frame([_row(of_cell, cells[key], reasons) for key, of_cell in runs], COLUMNS)
    measured = data["relative"].notna().any() or data["samples_per_s"].notna().any()
    empty = None if measured else "no completed run has enough timed steps"
    title, caption = _title(data, cells), _caption(folder, selection.runs)
    return Table("C", "c_throughput", data, title, caption, excluded=excluded, marks=folder.marks, empty=empty)


def _row(runs: list[RunRecord], cell: Cell, reasons: dict[str, str]) -> dict:
    entered = [run for run in runs if run.run_id not in reasons]
    row = identity(runs[0]) | {"n": len(entered), "samples_per_s": cell.samples_per_s, "word": None}
    row |= dict.fromkeys(("relative", "low", "high"), math.nan) | {"run_ids": " ".join(run.run_id for run in entered)}
    if not entered:
        return row | {"word": _word(runs, reasons)}
    if cell.dtype_config == REFERENCE:
        return row | {"relative": 1.0}
    if not cell.speed.n:
        return row | {"word": "no fp32_true to compare with"}
    return row | {"n": cell.speed.n, "relative": cell.speed.value, "low": cell.speed.low, "high": cell.speed.high}


def _word(absent: list[RunRecord], reasons: dict[str, str]) -> str:
    """Why there is no bar: the first divergence, else the first reason."""
    diverged = [run for run in absent if run.status == "diverged"]
    return divergence_text(min(diverged, key=lambda run: run.divergence_step)) if diverged else reasons[absent[0].run_id]


def _title(data: pd.DataFrame, cells: dict[tuple[str, str], Cell]) -> str:
    """Who is shown to be faster than fp32_true, in how many cases; who only looks so, fails or trains worse leads nobody."""
    known = data[data["relative"].notna() & (data["dtype_config"] != REFERENCE) & ~data["dtype_config"].map(is_control)]
    if known.empty:
        return "Not decided: no configuration to choose was timed beside a comparable fp32_true run."
    lost = [(cell := cells[key]).n_failed > 0 or cell.poor for key in zip(known["case"], known["dtype_config"], strict=True)]
    among = "of those " + ("that neither failed nor train worse and are " if any(lost) else "")
    known = known[~np.array(lost)]
    if known.empty:
        return "Not decided: every configuration that was timed beside fp32_true failed in some seed or trains worse."
    cases = count(known["case"].nunique(), "case")
    if not known["low"].notna().any():
        best = known.loc[known.groupby("case")["relative"].idxmax()]
        return sentence(f"not resolved: one seed has no interval; the largest ratios to fp32_true are {_span(best)} in {cases}")
    shown = known[known["low"] > 1]
    if shown.empty and (known["high"] < 1).all():
        best = known.loc[known.groupby("case")["relative"].idxmax()]
        return sentence(f"every configuration is slower than fp32_true in {cases} ({_span(best)} at best)")
    if shown.empty:
        best = known.loc[known.groupby("case")["relative"].idxmax()]
        return sentence(
            f"not resolved: no configuration is shown to be faster than fp32_true in any of {cases} ({_span(best)})"
        )
    best = shown.loc[shown.groupby("case")["relative"].idxmax()]
    names = series_order(best["dtype_config"].unique())
    verb = "leads" if len(names) == 1 else "lead"
    resolved = f"resolved in {len(best)} of {cases}"
    return sentence(f"{among}shown to be faster than fp32_true, {shortened(names)} {verb} at {_span(best)} ({resolved})")


def _span(best) -> str:
    return span(best["relative"], ".2f") + "x"


def _caption(folder: Folder, runs) -> str:
    return (
        f"{data_text(folder, runs)} Points: geometric mean over seeds of samples/s relative to fp32_true of the same case "
        "and seed, total over total of the timed steps; lines: 95 % t-interval on the paired log-ratios, with an arrow's head "
        "where it goes on; one seed has none. A run enters when it completed with at least 50 (tiny preset: 10) timed, finite "
        "steps after warm-up, and was neither throttled nor contended. A word stands where no run entered."
    )
