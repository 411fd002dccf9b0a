"""P4 (plot H): the best configuration changes with the task."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from report.hypotheses.evidence_base import EvidenceBase
from report.hypotheses.finding import NOT_DECIDED, REFUTED, SUPPORTED, Evidence, Finding, finding, somewhere
from report.statistics.interval import FEWEST_SEEDS, Interval, exponential, mean_interval
from report.tables.columns import TASK_COLUMNS, column_of
from report.tables.group_speed import group_scores
from report.words import bounds

CLAIM = "The best configuration changes with the task: one that is fastest on one task is not on another."
SMALLEST = math.log(1.02)
"""Within 2 % of the fastest a configuration serves as well."""

ByConfig = dict[str, list[float]]


def judge(base: EvidenceBase) -> Finding:
    """Pairs of tasks, among configurations that completed both with good quality."""
    good = [
        run
        for run in base.selection.runs
        if base.state(run) == "completed" and run.run_id in {r.run_id for r in base.timed(run.case, run.dtype_config).values()}
    ]
    scores = group_scores(good, column_of)
    columns = [column for column in TASK_COLUMNS if len(scores.get(column, {})) > 1]
    evidence = [
        e
        for first, second in combinations(columns, 2)
        if (e := _place(first, second, scores[first], scores[second])) is not None
    ]
    run_ids = tuple(run.run_id for run in good)
    evidence = [Evidence(e.place, e.verdict, e.interval, e.sentence, run_ids) for e in evidence]
    return finding(
        "P4",
        CLAIM,
        "H",
        "speed of the one task's best on the other, relative to that one's best",
        evidence,
        somewhere(evidence),
        missing="two tasks with healthy references and two configurations each, seeds 0 1 2",
    )


def _place(first: str, second: str, scores: ByConfig, others: ByConfig) -> Evidence | None:
    """One pair of tasks: is there one configuration for both?"""
    common = [config for config in scores if config in others]
    if len(common) < 2:
        return None
    sides = [{config: side[config] for config in common} for side in (scores, others)]
    best = [max(common, key=lambda config, side=side: float(np.mean(side[config]))) for side in sides]
    lead_first, lead_second = (_lead(side, *pair) for side, pair in zip(sides, (best, best[::-1]), strict=True))
    n = min(len(side[common[0]]) for side in sides)
    loss = exponential(_negative(lead_second))
    if best[0] == best[1]:
        sentence = f"{best[0]} is fastest on both."
    else:
        sentence = (
            f"{best[0]} is fastest on {first}, {best[1]} on {second}, where {best[0]} reaches {loss.value:.2f} "
            f"{bounds(loss, '.2f')} of its speed."
        )
    verdict = NOT_DECIDED
    if n >= FEWEST_SEEDS:
        if any(all(_serves(side, config) for side in sides) for config in common):
            verdict = REFUTED
        elif best[0] != best[1] and lead_first.above(0.0) and lead_second.above(0.0):
            verdict = SUPPORTED
    return Evidence(f"{first} / {second}", verdict, Interval(loss.value, loss.low, loss.high, n), sentence)


def _lead(side: ByConfig, config: str, rival: str) -> Interval:
    return mean_interval(np.subtract(side[config], side[rival]))


def _negative(interval: Interval) -> Interval:
    return Interval(-interval.value, -interval.high, -interval.low, interval.n)


def _serves(side: ByConfig, config: str) -> bool:
    """Whether no other configuration is faster by 2 % or more, with certainty."""
    return all(_lead(side, rival, config).below(SMALLEST) for rival in side if rival != config)
