"""The benchmark's hypotheses: H1 loss-scale inversion, H2 architecture inversion, H3 bottleneck instability."""

from __future__ import annotations

import math
from collections import defaultdict

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.hypotheses.evidence import (
    BySeed,
    Evidence,
    EvidenceBase,
    Finding,
    decide,
    decide_count,
    difference,
    finding,
    log_speed_ratios,
    run_ids,
    unanimous,
)
from report.statistics import Interval, exponential, mean_interval, share_interval
from report.tables.judgement import divergence_text
from report.tables.selection import REFERENCE, column_of, is_lm, series_order
from report.text import bounds, joined, shortened

H1 = "Loss-scale inversion: fp16_naive trains on single-label classification and diverges on multi-label."
STRESSED, CLEAN = "fp16_naive", "fp16_naive_fp32_states"
SETTLED = ("completed", "diverged")


def judge_h1(base: EvidenceBase) -> Finding:
    """Per architecture and loss reduction; where AdamW's epsilon makes fp16_naive diverge in both tasks, the
    control with fp32 AdamW states is judged instead: it shows what precision itself does."""
    pairs = _label_pairs(base)
    evidence = [e for single, multi, place in pairs if (e := _h1_evidence(base, single, multi, place)) is not None]
    controls = [
        line
        for single, multi, place in pairs
        for config in (STRESSED, *DTYPE_CONFIGS[STRESSED].controls)
        if (line := _line(base, single, multi, place, config)) is not None
    ]
    missing = f"single- and multi-label runs (mean and label_sum) of {STRESSED} and its controls with seeds 0 1 2"
    return finding("H1", H1, "G", "share of seeds with the inversion", evidence, unanimous(evidence), missing, controls)


def _label_pairs(base: EvidenceBase) -> list[tuple[str, str, str]]:
    """(single-label case, multi-label case, place) of every architecture and reduction."""
    singles = {run.arch: case for case, run in base.cases.items() if column_of(run) == "Cls-Single"}
    return [
        (singles[run.arch], case, f"{run.arch}, {run.loss_reduction}")
        for case, run in base.cases.items()
        if column_of(run) == "Cls-Multi" and run.arch in singles
    ]


def _settled(base: EvidenceBase, single: str, multi: str, config: str) -> tuple[BySeed, BySeed]:
    """Runs of both cases that completed or diverged, for the seeds that both have."""
    cells = [{seed: run for seed, run in base.runs(case, config).items() if run.status in SETTLED} for case in (single, multi)]
    seeds = cells[0].keys() & cells[1].keys()
    first, second = ({seed: cell[seed] for seed in sorted(seeds)} for cell in cells)
    return first, second


def _h1_evidence(base: EvidenceBase, single: str, multi: str, place: str) -> Evidence | None:
    cells = _settled(base, single, multi, STRESSED)
    judged, why = STRESSED, ""
    if cells[0] and all(_diverged_in_optimizer(run) for cell in cells for run in cell.values()):
        why = f"{STRESSED} diverges in the optimizer in both tasks"
        control = _settled(base, single, multi, CLEAN)
        if control[0]:
            judged, cells, why = CLEAN, control, f"{why}, so its control with fp32 AdamW states is judged. "
        else:
            why += ". "
    if not cells[0]:
        return None
    hits = sum(cells[0][seed].status == "completed" and cells[1][seed].status == "diverged" for seed in cells[0])
    share = share_interval(hits, len(cells[0]))
    sentence = (
        f"{why}{judged} trains on single-label and diverges on multi-label with {hits} of {count(share.n, 'seed')} "
        f"[{share.low:.2f}, {share.high:.2f}]."
    )
    return Evidence(place, decide_count(hits, share.n), share, sentence, run_ids(*cells))


def _diverged_in_optimizer(run: RunRecord) -> bool:
    return run.status == "diverged" and run.first_nonfinite is not None and run.first_nonfinite.phase == "optimizer"


def _line(base: EvidenceBase, single: str, multi: str, place: str, config: str) -> str | None:
    """How many runs of a configuration diverged in each task, and how."""
    cells = _settled(base, single, multi, config)
    if not cells[0]:
        return None
    parts = []
    for name, cell in zip(("single-label", "multi-label"), cells, strict=True):
        diverged = [divergence_text(run) for run in cell.values() if run.status == "diverged"]
        how = f" ({', '.join(sorted(set(diverged)))})" if diverged else ""
        parts.append(f"{name} {len(diverged)} of {len(cell)} diverged{how}")
    return f"{place}, {config}: {'; '.join(parts)}."


H2 = "Architecture inversion: bf16_pure speeds RoBERTa up more than GPT-2, relative to fp32_true."
CONFIG, SMALL, LARGE = "bf16_pure", "gpt2", "roberta"
SMALLEST_GAIN = math.log(1.02)
"""A gain that is less than 2 % larger is no inversion."""


def judge_h2(base: EvidenceBase) -> Finding:
    """Pairs of cases with one task, one reduction and one sequence length. The denominator is common:
    the gain is samples/s over fp32_true's, which for one case is the ratio of MFU against one peak."""
    evidence, not_compared = [], []
    for roberta in (run for run in base.cases.values() if run.arch == LARGE):
        gpt2 = _counterpart(base, roberta)
        if gpt2 is None:
            continue
        partner, why = _matched(base.folder, gpt2, roberta)
        if partner is None:
            not_compared.append(f"{gpt2.case} and {roberta.case} are not compared: {why}.")
        elif (found := _h2_evidence(partner, base, gpt2.case, roberta)) is not None:
            evidence.append(found)
    missing = (
        f"{CONFIG} and {REFERENCE} of both architectures at one sequence length, seeds 0 1 2 "
        "(for LM: gpt2_clm with --seq-len 512)"
    )
    return finding("H2", H2, "B", "ratio of gains", evidence, unanimous(evidence), missing, not_compared)


def _counterpart(base: EvidenceBase, roberta: RunRecord) -> RunRecord | None:
    """GPT-2's case of the same kind: a language model beside a language model, else the same task."""
    return next(
        (
            run
            for run in base.cases.values()
            if run.arch == SMALL
            and (
                is_lm(run) and is_lm(roberta)
                if is_lm(run) or is_lm(roberta)
                else (column_of(run), run.loss_reduction) == (column_of(roberta), roberta.loss_reduction)
            )
        ),
        None,
    )


def _matched(folder: Folder, gpt2: RunRecord, roberta: RunRecord) -> tuple[EvidenceBase | None, str]:
    """GPT-2's runs at RoBERTa's sequence length (perhaps a control variant of the case), or why not."""
    if gpt2.weights_source != roberta.weights_source:
        return None, f"weights {gpt2.weights_source} against {roberta.weights_source}"
    if gpt2.attention_backend != roberta.attention_backend:
        return None, f"attention backend {gpt2.attention_backend} against {roberta.attention_backend}"
    matched = EvidenceBase.of(folder, lambda run: run.case == gpt2.case and run.seq_len == roberta.seq_len)
    if not matched.selection.runs:
        return None, f"sequence length {gpt2.seq_len} against {roberta.seq_len}"
    return matched, ""


def _h2_evidence(small: EvidenceBase, large: EvidenceBase, gpt2: str, roberta: RunRecord) -> Evidence | None:
    gains, cells = [], []
    for base, case in ((large, roberta.case), (small, gpt2)):
        pure, reference = base.timed(case, CONFIG), base.timed(case, REFERENCE)
        gains.append(log_speed_ratios(pure, reference))
        cells += [pure, reference]
    ratio = difference(*gains)
    if ratio.n == 0:
        return None
    each = [math.exp(sum(gain.values()) / len(gain)) for gain in gains]
    shown = exponential(ratio)
    backends = joined(sorted({str(run.attention_backend) for cell in cells for run in cell.values()}))
    sentence = (
        f"{CONFIG} gains {each[0]:.2f}x on RoBERTa and {each[1]:.2f}x on GPT-2, {shown.value:.2f} "
        f"{bounds(shown, '.2f')} times as much (sequence length {roberta.seq_len}, attention: {backends})."
    )
    return Evidence(f"{roberta.case} / {gpt2}", decide(ratio, SMALLEST_GAIN), shown, sentence, run_ids(*cells))


H3 = "Bottleneck instability: GPT-2 classification needs more precision than RoBERTa classification."
FRAGILE, STURDY = "gpt2", "roberta"
SMALLEST_GAP = 0.02
"""A difference of less than 2 % of the configurations is none."""


def judge_h3(base: EvidenceBase) -> Finding:
    """Share of 16-bit configurations that diverge or train worse, GPT-2 minus RoBERTa, seed by seed."""
    evidence, notes = [], []
    for gpt2, roberta, place in _architecture_pairs(base):
        unhealthy = [case for case in (gpt2, roberta) if case in base.judgements.unhealthy]
        if unhealthy:
            notes.append(f"{place} is not judged: the reference of {' and '.join(unhealthy)} is unhealthy.")
        elif (found := _h3_evidence(base, gpt2, roberta, place)) is not None:
            evidence.append(found)
    missing = "classification runs of both architectures in 16-bit configurations beside a healthy fp32_true, seeds 0 1 2"
    return finding("H3", H3, "A", "share of 16-bit configurations", evidence, unanimous(evidence), missing, notes)


def _architecture_pairs(base: EvidenceBase) -> list[tuple[str, str, str]]:
    def key(run):
        return column_of(run), run.loss_reduction

    sturdy = {key(run): case for case, run in base.cases.items() if run.arch == STURDY and not is_lm(run)}
    return [
        (case, sturdy[key(run)], f"{key(run)[0]}, {run.loss_reduction}")
        for case, run in base.cases.items()
        if run.arch == FRAGILE and key(run) in sturdy
    ]


def _h3_evidence(base: EvidenceBase, gpt2: str, roberta: str, place: str) -> Evidence | None:
    configs = [
        config
        for config in series_order({run.dtype_config for run in base.selection.runs})
        if config in DTYPE_CONFIGS and DTYPE_CONFIGS[config].compute != "fp32"
    ]
    pairs: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    compared: list[str] = []
    for config in configs:
        first, second = base.runs(gpt2, config), base.runs(roberta, config)
        for seed in sorted(first.keys() & second.keys()):
            failed = [_failed(base.state(cell[seed])) for cell in (first, second)]
            if None not in failed:
                pairs[seed].append((config, *failed))
                compared += [first[seed].run_id, second[seed].run_id]
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
    return Evidence(place, decide(gap, SMALLEST_GAP), gap, sentence, tuple(compared))


def _failed(state: str) -> int | None:
    """1 for a run that diverged or trains worse, 0 for one that completed, None for what cannot be judged."""
    return {"diverged": 1, "stalled": 1, "completed": 0}.get(state)


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)
