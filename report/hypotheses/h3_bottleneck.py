"""H3, bottleneck instability: GPT-2 classification needs more precision than RoBERTa's."""

from __future__ import annotations

from collections import defaultdict

from bench_cases import DTYPE_CONFIGS
from report.hypotheses.evidence_base import EvidenceBase
from report.hypotheses.finding import Evidence, Finding, decide, finding, unanimous
from report.statistics.interval import Interval, mean_interval
from report.tables.columns import column_of, is_lm, series_order
from report.words import bounds, shortened

CLAIM = "Bottleneck instability: GPT-2 classification needs more precision than RoBERTa classification."
FRAGILE, STURDY = "gpt2", "roberta"
SMALLEST = 0.02
"""A difference of less than 2 % of the configurations is none."""


def judge(base: EvidenceBase) -> Finding:
    """Share of 16-bit configurations that diverge or train worse, GPT-2 minus RoBERTa, seed by seed."""
    evidence, notes = [], []
    for gpt2, roberta, place in _case_pairs(base):
        ill = [case for case in (gpt2, roberta) if case in base.judgements.unhealthy]
        if ill:
            notes.append(f"{place} is not judged: the reference of {' and '.join(ill)} is unhealthy.")
        elif (found := _place(base, gpt2, roberta, place)) is not None:
            evidence.append(found)
    return finding(
        "H3",
        CLAIM,
        "A",
        "share of 16-bit configurations",
        evidence,
        unanimous(evidence),
        more=notes,
        missing="classification runs of both architectures in 16-bit configurations beside a healthy fp32_true, seeds 0 1 2",
    )


def _case_pairs(base: EvidenceBase) -> list[tuple[str, str, str]]:
    def key(run):
        return column_of(run), run.loss_reduction

    sturdy = {key(run): case for case, run in base.cases.items() if run.arch == STURDY and not is_lm(run)}
    return [
        (case, sturdy[key(run)], f"{key(run)[0]}, {run.loss_reduction}")
        for case, run in base.cases.items()
        if run.arch == FRAGILE and key(run) in sturdy
    ]


def _place(base: EvidenceBase, gpt2: str, roberta: str, place: str) -> Evidence | None:
    configs = [
        config
        for config in series_order({run.dtype_config for run in base.selection.runs})
        if config in DTYPE_CONFIGS and DTYPE_CONFIGS[config].compute != "fp32"
    ]
    pairs: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    run_ids: list[str] = []
    for config in configs:
        first, second = base.runs(gpt2, config), base.runs(roberta, config)
        for seed in sorted(first.keys() & second.keys()):
            failed = [_failed(base.state(cell[seed])) for cell in (first, second)]
            if None not in failed:
                pairs[seed].append((config, *failed))
                run_ids += [first[seed].run_id, second[seed].run_id]
    if not pairs:
        return None
    # Every seed is judged on the same configurations, so that a seed with fewer runs moves nothing.
    common = set.intersection(*({config for config, *_ in seed} for seed in pairs.values()))
    if not common:
        return None
    shares = [
        [sum(failed[1 + side] for failed in seed if failed[0] in common) / len(common) for seed in pairs.values()]
        for side in (0, 1)
    ]
    gap = mean_interval([a - b for a, b in zip(*shares, strict=True)])
    only = sorted({c for seed in pairs.values() for c, a, b in seed if a and not b and c in common})
    sentence = (
        f"{100 * sum(shares[0]) / gap.n:.0f} % of {len(common)} 16-bit configurations fail on GPT-2 and "
        f"{100 * sum(shares[1]) / gap.n:.0f} % on RoBERTa: {100 * gap.value:+.0f} {bounds(_percent(gap), '.0f')} points"
        + (f" (only on GPT-2: {shortened(series_order(only))})." if only else ".")
    )
    return Evidence(place, decide(gap, SMALLEST), gap, sentence, tuple(run_ids))


def _failed(state: str) -> int | None:
    """1 for a run that diverged or trains worse, 0 for one that completed, None for what cannot be judged."""
    return {"diverged": 1, "poor": 1, "completed": 0}.get(state)


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)
