"""A: which configuration completes, diverges or trains worse, for every case."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.statistics import mean_interval
from report.tables.judgement import Judged, Judgements, divergence_kind, gap_text, judge_runs
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
WORST_FIRST = ("diverged", "poor", "failed", "unjudged", "completed", "unsupported", "unfinished")


def table(folder: Folder) -> Table:
    """One row a cell; a cell takes the worst state of its seeds and says how many they are. Runs that were ended from
    outside do not count as seeds, unless there is nothing else."""
    judgements = judge_runs(folder)
    runs = judgements.selection.runs
    cases = {run.case: run for run in reversed(runs)}
    order = sorted(case_order(cases), key=lambda case: TASK_COLUMNS.index(column_of(cases[case])))
    configs = series_order(
        {run.dtype_config for run in runs} | {config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix}
    )
    data = frame([_cell(judgements, cases[case], config) for case in order for config in configs], COLUMNS)
    absent = [column for column in TASK_COLUMNS if column not in set(data["column"])]
    title, caption, excluded = _title(data, judgements), _caption(folder, judgements, absent), judgements.selection.excluded
    return Table("A", "a_stability_matrix", data, title, caption, excluded=excluded, marks=folder.marks)


def _cell(judgements: Judgements, case: RunRecord, config: str) -> dict:
    every = judgements.of(case.case, config)
    judged = [j for j in every if j.state != "unfinished"] or every
    state = next((s for s in WORST_FIRST if any(j.state == s for j in judged)), "missing")
    bad = [j for j in judged if j.state == state]
    line1, line2 = _lines(state, bad, len(judged), config, judgements)
    diverged = bad if state == "diverged" else []
    return identity(case) | {
        "dtype_config": config,
        "state": state,
        "n_seeds": len(judged),
        "sign": SIGNS[state],
        "n_bad": len(bad) if state in ("diverged", "poor", "failed") else 0,
        "step": min((j.run.divergence_step for j in diverged), default=None),
        "phase": _phase(diverged),
        "line1": line1,
        "line2": line2,
        "run_ids": " ".join(j.run.run_id for j in judged),
    }


def _lines(state: str, bad: list[Judged], n: int, config: str, judgements: Judgements) -> tuple[str, str]:
    """The two short lines of a cell."""
    seeds = f"{len(bad)} of {count(n, 'seed')}"
    if state == "diverged":
        phase = _phase(bad)
        return _divergence(bad), f"{_short_phase(phase)}, {len(bad)}/{n}" if phase else seeds
    if state == "missing":
        return "not run", ""
    if state in ("unsupported", "unfinished"):
        return state, ""
    if state == "failed":
        return bad[0].run.status, seeds
    if state == "unjudged":
        unhealthy = bad[0].run.case in judgements.unhealthy
        if config == REFERENCE:
            return ("ends higher", "unhealthy") if unhealthy else ("not judged", seeds)
        why = "unhealthy ref" if unhealthy else "incomparable" if "not comparable" in bad[0].reason else "no reference"
        return "not judged", why
    if state == "poor":
        worst = max(bad, key=lambda j: j.gap if j.gap is not None else 0)
        return (gap_text(worst.gap, worst.unit) if "loss" in worst.reason else f"F1 {signed(100 * worst.f1_gap, 1)} pt"), seeds
    if config == REFERENCE:
        return "reference", f"healthy, n={n}"
    return _gap_line(bad), count(n, "seed")


def _gap_line(judged: list[Judged]) -> str:
    """The mean distance from the reference, and whether the seeds resolve it."""
    gaps = mean_interval([j.gap for j in judged if j.gap is not None])
    resolved = RESOLVED if gaps.above(0) or gaps.below(0) else ""
    return gap_text(gaps.value, judged[0].unit) + resolved if gaps.n else ""


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


def _title(data, judgements: Judgements) -> str:
    """The finding: who diverges or is poor, in how many of the cases where it ran."""
    findings = []
    for state, verb in VERBS.items():
        cases: dict[tuple[int, int], list[str]] = defaultdict(list)
        for config in dict.fromkeys(data["dtype_config"]):
            rows = data[(data["dtype_config"] == config) & (data["n_seeds"] > 0) & (data["state"] != "unfinished")]
            if hits := int((rows["state"] == state).sum()):
                cases[hits, len(rows)].append(config)
        for (hits, n), names in sorted(cases.items(), reverse=True):
            findings.append(f"{shortened(names)} {verb[len(names) > 1]} in {hits} of {count(n, 'case')}")
    title = "; ".join(findings) or ("no configuration diverges or trains worse" if len(data) else "no runs")
    if judgements.unhealthy:
        title += f"; {count(len(judgements.unhealthy), 'case')} not judged (reference unhealthy)"
    elif not np.isin(data["state"], ("completed", "poor", "diverged")).any():
        title = "Not decided: no cell could be judged"
    return sentence(title)


def _caption(folder: Folder, judgements: Judgements, absent: list[str]) -> str:
    unhealthy = " ".join(f"{case} is not judged: {reason}." for case, reason in sorted(judgements.unhealthy.items()))
    missing = f" Not run: {', '.join(absent)}." if absent else ""
    return (
        f"{data_text(folder, judgements.selection.runs)} A cell has the worst state of its seeds. Diverged: a loss, an "
        "applied gradient, a parameter or an optimizer state became non-finite, or the loss exploded. Poor: completed, "
        "with a loss above fp32_true of the same case and seed by more than 0.2 nats (language models) or 10 % "
        "(classification), or micro-F1 down by more than 2 points. loss↑: it exploded with finite "
        "values. *: the 95 % t-interval over seeds of the "
        "paired difference excludes 0. k/n: seeds. Healthy: the reference ends below its start. Not judged: without a "
        "healthy reference. No result: out of memory, an error or hung. Unfinished: stopped or killed from outside."
        f"{missing} {unhealthy}"
    ).strip()
