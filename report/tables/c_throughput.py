"""C: samples per second relative to fp32_true of the same case and seed."""

from __future__ import annotations

import math

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.tables.judgement import divergence_text
from report.tables.selection import REFERENCE, TASK_COLUMNS, Selection, case_order, column_of, is_control, select, series_order
from report.tables.speed import eligible, fair_pairs, paired_ratio, pooled_rate
from report.tables.table import Table, data_text, frame
from report.text import sentence, shortened

COLUMNS = ("case", "column", "arch", "dtype_config", "n", "relative", "low", "high", "samples_per_s", "word", "run_ids")


def table(folder: Folder) -> Table:
    """One row a case and configuration: a bar with its paired interval, or a word."""
    selection = select(folder)
    runs, excluded = eligible(folder, selection)
    cases = {run.case: run for run in reversed(selection.runs)}
    order = sorted(case_order(cases), key=lambda case: TASK_COLUMNS.index(column_of(cases[case])))
    rows = [
        _row(selection, runs, cases[case], config, dict(excluded))
        for case in order
        for config in series_order({run.dtype_config for run in selection.of_case(case)})
    ]
    data = frame(rows, COLUMNS)
    empty = (
        None
        if data["relative"].notna().any() or data["samples_per_s"].notna().any()
        else "no completed run has enough timed steps"
    )
    return Table(
        "C",
        "c_throughput",
        data,
        _title(data),
        _caption(folder, selection.runs),
        excluded=excluded,
        marks=folder.marks,
        empty=empty,
    )


def _row(selection: Selection, runs: list[RunRecord], case: RunRecord, config: str, reasons: dict[str, str]) -> dict:
    entered = [run for run in runs if (run.case, run.dtype_config) == (case.case, config)]
    row = {
        "case": case.case,
        "column": column_of(case),
        "arch": case.arch,
        "dtype_config": config,
        "n": len(entered),
        "relative": math.nan,
        "low": math.nan,
        "high": math.nan,
        "samples_per_s": math.nan,
        "word": None,
        "run_ids": " ".join(run.run_id for run in entered),
    }
    if not entered:
        absent = [run for run in selection.of_case(case.case) if run.dtype_config == config]
        return row | {"word": _word(absent, reasons)}
    row["samples_per_s"] = pooled_rate([run.samples_per_s for run in entered])
    if config == REFERENCE:
        return row | {"relative": 1.0}
    pairs = fair_pairs(entered, [run for run in runs if (run.case, run.dtype_config) == (case.case, REFERENCE)])
    ratio = paired_ratio(pairs, lambda run: run.samples_per_s)
    if ratio.n == 0:
        return row | {"word": "no fp32_true to compare with"}
    return row | {"n": ratio.n, "relative": ratio.value, "low": ratio.low, "high": ratio.high}


def _word(absent: list[RunRecord], reasons: dict[str, str]) -> str:
    """Why there is no bar: the first death, else the first reason."""
    dead = [run for run in absent if run.status == "diverged"]
    return divergence_text(min(dead, key=lambda run: run.divergence_step)) if dead else reasons[absent[0].run_id]


def _title(data) -> str:
    """The fastest configuration of each task, with how often the seeds resolve it against fp32_true."""
    known = data[data["relative"].notna() & (data["dtype_config"] != REFERENCE) & ~data["dtype_config"].map(is_control)]
    if known.empty:
        return "Not decided: no configuration has a comparable fp32_true run."
    best = known.loc[known.groupby("case")["relative"].idxmax()]
    low, high = best["relative"].min(), best["relative"].max()
    names = shortened(series_order(best["dtype_config"]))
    span = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}x"
    resolved = int((best["low"] > 1).sum())
    surety = f"resolved in {resolved} of {len(best)} cases" if best["low"].notna().any() else "one seed: no interval"
    return sentence(f"fastest is {names}, at {span} the speed of fp32_true ({surety})")


def _caption(folder: Folder, runs) -> str:
    return (
        f"{data_text(folder, runs)} Bars: geometric mean over seeds of samples/s relative to fp32_true of the same case "
        "and seed, total over total of the timed steps; lines: 95 % t-interval on the paired log-ratios; one seed has a "
        "dot and no interval. A run enters when it completed with at least 50 (tiny preset: 10) timed, finite steps "
        "after warm-up, and was neither throttled nor contended. A word stands where no run entered."
    )
