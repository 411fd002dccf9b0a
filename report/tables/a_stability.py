"""A: which configuration completes, diverges or trains worse, for every case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.cells import FAILING, INCOMPARABLE, STALLED, UNFINISHED, UNHEALTHY, UNMEASURED, Cell, Quality
from report.tables.choice import all_cells, case_tables
from report.tables.judgement import MARGIN_F1, MARGIN_LOSS, MARGIN_NATS, Judged, divergence_kind, judge_runs
from report.tables.selection import REFERENCE, TASK_COLUMNS, case_order, column_of, series_order
from report.tables.table import Table, data_text, frame, identity
from report.text import sentence, shortened, signed

COLUMNS = tuple("case column arch loss_reduction dtype_config state n_seeds n_bad step phase sign line1 line2 run_ids".split())
SIGNS = {
    "completed": "✓",
    "diverged": "✗",
    "poor": "!",
    "failed": "⚠",
    "unsupported": "–",
    "missing": "·",
    "unjudged": "?",
    "unfinished": "…",
}
VERBS = {
    "diverged": ("diverges", "diverge"),
    "poor": ("trains worse", "train worse"),
    "failed": ("fails to finish", "fail to finish"),
}
RESOLVED = "*"
"""After a difference that the seeds resolve from 0; a cell has room for a sign and not for the word."""
SHORT_PHASES = {"optimizer": "optim", "backward": "backw."}


def table(folder: Folder) -> Table:
    """One row a cell, in the state that `report.tables.cells` gives it: what failed in any seed, else what was shown. Runs that
    were ended from outside do not count as seeds."""
    judgements, cells = judge_runs(folder), all_cells(folder)
    runs = judgements.selection.runs
    cases = {run.case: run for run in reversed(runs)}
    order = sorted(case_order(cases), key=lambda case: TASK_COLUMNS.index(column_of(cases[case])))
    configs = series_order(
        {run.dtype_config for run in runs} | {config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix}
    )
    data = frame(
        [
            _row(cases[case], config, cells.get((case, config)), judgements.of(case, config))
            for case in order
            for config in configs
        ],
        COLUMNS,
    )
    absent = [column for column in TASK_COLUMNS if column not in set(data["column"])]
    unhealthy = {table.case: table.unhealthy for table in case_tables(folder) if table.unhealthy}
    title, caption = _title(data, unhealthy), _caption(folder, runs, unhealthy, absent)
    return Table("A", "a_stability_matrix", data, title, caption, excluded=judgements.selection.excluded, marks=folder.marks)


def _row(case: RunRecord, config: str, cell: Cell | None, judged: list[Judged]) -> dict:
    state = "missing" if cell is None else _state(cell, judged)
    diverged = [j for j in judged if j.state == "diverged"]
    line1, line2 = _lines(cell, state, diverged) if cell else ("not run", "")
    return identity(case) | {
        "dtype_config": config,
        "state": state,
        "n_seeds": cell.n if cell else 0,
        "sign": SIGNS[state],
        "n_bad": cell.n_failed if cell and cell.n_failed else cell.n if cell and state == "poor" else 0,
        "step": min((j.run.divergence_step for j in diverged), default=None),
        "phase": _phase(diverged),
        "line1": line1,
        "line2": line2,
        "run_ids": " ".join(cell.run_ids) if cell else "",
    }


def _state(cell: Cell, judged: list[Judged]) -> str:
    """The figure's state of a cell."""
    if cell.state in (FAILING, STALLED):
        return "diverged" if any(j.state == "diverged" for j in judged) else "failed"
    if cell.state == UNMEASURED:
        return "unsupported" if cell.what.startswith("unsupported") else "failed"
    return {UNHEALTHY: "unjudged", INCOMPARABLE: "unjudged", UNFINISHED: "unfinished"}.get(
        cell.state, "poor" if cell.poor else "completed"
    )


def _lines(cell: Cell, state: str, diverged: list[Judged]) -> tuple[str, str]:
    """The two short lines of a cell."""
    seeds = f"{cell.n_failed} of {count(cell.n, 'seed')}"
    reference = cell.dtype_config == REFERENCE
    if state == "diverged":
        phase = _phase(diverged)
        return _divergence(diverged), f"{_short_phase(phase)}, {cell.n_failed}/{cell.n}" if phase else seeds
    if state in ("unsupported", "unfinished"):
        return state, ""
    if state == "failed":
        return cell.what.split(":")[0].split(",")[0], seeds if cell.n_failed else ""
    if cell.state == UNHEALTHY:
        return ("not healthy", "reference") if reference else ("not judged", "unhealthy ref")
    if cell.state == INCOMPARABLE:
        why = "incomparable" if "not comparable" in cell.what else "no reference"
        return "not judged", count(cell.n, "seed") if reference else why
    if reference:
        return "reference", f"healthy, n={cell.n}"
    return _difference(cell), count(cell.n, "seed")


def _difference(cell: Cell) -> str:
    """The mean distance from the reference by the first measure that judges, and whether the seeds resolve it from 0."""
    quality = next((q for q in cell.judged_qualities if q.difference.n), None)
    if quality is None:
        return ""
    return _short_difference(quality) + (RESOLVED if quality.difference.above(0) or quality.difference.below(0) else "")


def _short_difference(quality: Quality) -> str:
    value = quality.difference.value
    return {
        "nats": f"{signed(value, 2)} nats",
        "share": f"{signed(100 * value, 1)} %",
        "F1": f"F1 {signed(100 * value, 1)} pt",
    }[quality.unit]


def _divergence(diverged: list[Judged]) -> str:
    """``NaN @ 50``, or the range of steps."""
    steps = sorted(j.run.divergence_step for j in diverged)
    kinds = "/".join(dict.fromkeys("loss↑" if (kind := divergence_kind(j.run)) == "exploded" else kind for j in diverged))
    return f"{kinds} @ {steps[0]}" + (f"–{steps[-1]}" if steps[-1] != steps[0] else "")


def _phase(diverged: list[Judged]) -> str | None:
    """The phases in which the first non-finite values were produced."""
    phases = dict.fromkeys(j.run.first_nonfinite.phase for j in diverged if j.run.first_nonfinite)
    return "/".join(phases) or None


def _short_phase(phase: str) -> str:
    """One phase as it fits a cell; several as their number, which the CSV spells out."""
    several = phase.count("/") + 1
    return SHORT_PHASES.get(phase, phase) if several == 1 else f"{several} phases"


def _title(data, unhealthy: dict[str, str]) -> str:
    """The finding: who diverges or is shown to train worse, in how many of the cases where it ran."""
    findings = []
    for state, verb in VERBS.items():
        cases: dict[tuple[int, int], list[str]] = defaultdict(list)
        for config in dict.fromkeys(data["dtype_config"]):
            rows = data[(data["dtype_config"] == config) & (data["n_seeds"] > 0) & (data["state"] != "unfinished")]
            if hits := int((rows["state"] == state).sum()):
                cases[hits, len(rows)].append(config)
        for (hits, n), names in sorted(cases.items(), reverse=True):
            findings.append(f"{shortened(names)} {verb[len(names) > 1]} in {hits} of {count(n, 'case')}")
    title = "; ".join(findings) or ("no configuration fails or is shown to train worse" if len(data) else "no runs")
    if unhealthy:
        title += f"; {count(len(unhealthy), 'case')} not judged (reference unhealthy)"
    elif not np.isin(data["state"], ("completed", "poor", "diverged")).any():
        title = "Not decided: no cell could be judged"
    return sentence(title)


def _caption(folder: Folder, runs: Sequence[RunRecord], unhealthy: dict[str, str], absent: list[str]) -> str:
    why = " ".join(f"{case} is not judged: {reason}." for case, reason in sorted(unhealthy.items()))
    missing = f" Not run: {', '.join(absent)}." if absent else ""
    return (
        f"{data_text(folder, runs)} Diverged: in some seed a loss, an applied gradient, a parameter or an optimizer state "
        "became non-finite, or the loss exploded. Poor: completed, and the seeds show that it trains worse than fp32_true by "
        f"more than {MARGIN_NATS:g} nats of loss (language models), or {100 * MARGIN_F1:g} point of micro- or macro-F1 or "
        f"{100 * MARGIN_LOSS:g} % of loss (classification). loss↑: it exploded with finite values. Number: mean paired "
        "difference from fp32_true; *: its 95 % t-interval over seeds excludes 0. k/n: seeds. Healthy: the reference learnt. "
        "Not judged: without a healthy reference. No result: out of memory, an error, hung or stalled. Unfinished: stopped or "
        f"killed from outside.{missing} {why}"
    ).strip()
