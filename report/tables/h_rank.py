"""H: whether the fastest configuration of language modelling is the fastest of classification too."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.statistics import FEWEST_FOR_TAU, exponential, kendall_tau, mean_interval, rank_with_ties
from report.tables.cells import Cell
from report.tables.choice import all_cells
from report.tables.selection import REFERENCE, is_control, select, series_order
from report.tables.speed import eligible
from report.tables.table import Table, data_text, frame
from report.text import bracketed, joined, sentence, shortened

COLUMNS = ("dtype_config", "side", "relative", "low", "high", "n", "rank", "tie_group", "with_leader")
SUMMARY = ("tau", "tau_low", "tau_high", "n_configs", "note")
SIDES = ("LM", "classification")
TOO_FEW = "fewer than two configurations finished every case of both language modelling and classification beside fp32_true"


def table(folder: Folder) -> Table:
    """Ranks of the configurations that finished every case of both sides, with ties."""
    selection = select(folder)
    runs, excluded = eligible(folder, selection)
    cells = all_cells(folder)
    scores = {side: _scores(cells, side) for side in SIDES}
    both = set.intersection(*(set(scores[side]) for side in SIDES))
    rows = [row for side in SIDES for row in _rows(side, {c: v for c, v in scores[side].items() if c in both})]
    data, summary = frame(rows, COLUMNS), _summary(scores, both)
    empty = None if len(both) > 1 else TOO_FEW
    title, caption = _title(data, summary, empty), _caption(folder, runs)
    return Table("H", "h_rank_correlation", data, title, caption, summary, excluded, folder.marks, empty)


def _scores(cells: dict[tuple[str, str], Cell], side: str) -> dict[str, list[float]]:
    """Configuration -> log speed relative to fp32_true, one value a seed, averaged over the side's cases. It counts with every
    case and seed that fp32_true has there, or not at all: a mean over other cases would rank cases. Left out: controls (they
    explain divergence) and what is shown to train worse in a case: it has lost, however fast."""
    references = [cell for cell in cells.values() if cell.dtype_config == REFERENCE and cell.log_speed]
    references = [cell for cell in references if SIDES[not cell.column.startswith("LM-")] == side]
    seeds = sorted({seed for cell in references for seed in cell.log_speed})
    found = {}
    for config in series_order({config for _, config in cells if not is_control(config)}):
        of_side = [cells.get((cell.case, config)) for cell in references]
        logs = [cell.log_speed if cell else {} for cell in of_side]
        if any(cell and cell.poor for cell in of_side):
            continue
        if logs and all(log.keys() == cell.log_speed.keys() for log, cell in zip(logs, references, strict=True)):
            found[config] = [float(np.mean([log[seed] for log in logs if seed in log])) for seed in seeds]
    return found


def _rows(side: str, scores: dict[str, list[float]]) -> list[dict]:
    rows = []
    for ranked in rank_with_ties(scores):
        speed = exponential(mean_interval(scores[ranked.name]))
        of_rank = ranked.rank, ranked.tie_group, ranked.with_leader
        values = ranked.name, side, speed.value, speed.low, speed.high, speed.n, *of_rank
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _summary(scores: dict[str, dict[str, list[float]]], both: set[str]) -> pd.DataFrame:
    configs = series_order(both)
    first, second = ([float(np.mean(scores[side][config])) for config in configs] for side in SIDES)
    tau = kendall_tau(first, second)
    note = (
        f"Kendall's tau needs {FEWEST_FOR_TAU} configurations, and {len(configs)} finished both sides"
        if tau is None
        else "interval: Fieller's, over configurations"
    )
    values = tau or (math.nan, math.nan, math.nan)
    return frame([dict(zip(SUMMARY, (*values, len(configs), note), strict=True))], SUMMARY)


def _title(data: pd.DataFrame, summary: pd.DataFrame, empty: str | None) -> str:
    if empty:
        return "Not decided: too few configurations finished both sides."
    first = {side: data[(data["side"] == side) & data["with_leader"]]["dtype_config"].tolist() for side in SIDES}
    tau = summary.iloc[0]
    interval = bracketed(tau["tau_low"], tau["tau_high"], ".2f")
    correlation = "" if math.isnan(tau["tau"]) else f" (Kendall's tau {tau['tau']:.2f}{interval})"
    if data["n"].max() < 2:
        return f"Not decided: one seed separates no ranks{correlation}."
    among = f"of the {data['dtype_config'].nunique()} that finished both sides, "
    if set(first["LM"]) & set(first["classification"]):
        shared = series_order(set(first["LM"]) & set(first["classification"]))
        verb = "is" if len(shared) == 1 else "are"
        return sentence(f"{among}{shortened(shared)} {verb} first, or tied for it, on both sides{correlation}")
    return sentence(
        f"{among}the fastest changes with the task: {joined(first['LM'])} for language models, "
        f"{joined(first['classification'])} for classification{correlation}"
    )


def _caption(folder: Folder, runs: list[RunRecord]) -> str:
    return (
        f"{data_text(folder, runs)} Rank by samples/s relative to fp32_true of the same case and seed, geometric mean "
        "over the side's cases; only configurations that finished every case and seed of both sides, without controls and what "
        "is shown to train worse. "
        "Brackets: those that the seeds do not separate from the first of them (t-intervals, 95 % together). Second panel: "
        "relative speed with its interval. Kendall's tau-b with Fieller's interval from five configurations up."
    )
