"""P1 (plot E): classification heads overflow fp16."""

from __future__ import annotations

import numpy as np

from instrument.results.schemas import RunRecord
from instrument.terminal import count
from kernels.float_formats import FP16
from report.hypotheses.evidence_base import EvidenceBase
from report.hypotheses.finding import Evidence, Finding, decide_count, finding, somewhere
from report.statistics.interval import exponential, mean_interval
from report.tables.columns import is_lm
from report.tables.e_logits import overflows
from report.words import bounds

CLAIM = "Classification heads overflow fp16: some logit passes 65,504."


def judge(base: EvidenceBase) -> Finding:
    """Per classification case, over all configurations: with how many seeds some logit left fp16's range."""
    evidence = [e for case, run in base.cases.items() if not is_lm(run) and (e := _place(base, case)) is not None]
    return finding(
        "P1",
        CLAIM,
        "E",
        "share of 65,504",
        evidence,
        somewhere(evidence),
        missing="classification runs with logged logits, seeds 0 1 2",
    )


def _place(base: EvidenceBase, case: str) -> Evidence | None:
    by_seed: dict[int, list[RunRecord]] = {}
    for run in base.selection.of_case(case):
        if np.isfinite(base.folder.steps(run.run_id)["logit_absmax"]).any():
            by_seed.setdefault(run.seed, []).append(run)
    if not by_seed:
        return None
    hits = sum(any(overflows(base.folder, run).any() for run in runs) for runs in by_seed.values())
    largest = [max(_largest(base, run) for run in runs) for runs in by_seed.values()]
    share = exponential(mean_interval(np.log([value / FP16.max for value in largest])))
    sentence = (
        f"a logit leaves fp16's range with {hits} of {count(share.n, 'seed')}; the largest finite one is "
        f"{max(largest):,.4g}, on average {share.value:.2g} {bounds(share, '.2g')} of 65,504."
    )
    return Evidence(
        case, decide_count(hits, share.n), share, sentence, tuple(run.run_id for runs in by_seed.values() for run in runs)
    )


def _largest(base: EvidenceBase, run: RunRecord) -> float:
    absmax = base.folder.steps(run.run_id)["logit_absmax"]
    return max(float(absmax[np.isfinite(absmax)].max(initial=0.0)), np.finfo(float).tiny)
