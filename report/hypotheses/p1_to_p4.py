"""The plots' claims: P1 heads overflow fp16, P2 bf16_pure is top-left, P3 padding, P4 the ranking changes with the task."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from instrument.results.schemas import RunRecord
from instrument.terminal import count
from kernels.float_formats import FP16
from report.hypotheses.evidence import (
    NOT_DECIDED,
    REFUTED,
    SUPPORTED,
    BySeed,
    Evidence,
    EvidenceBase,
    Finding,
    decide,
    decide_count,
    difference,
    everywhere,
    finding,
    log_speed_ratios,
    run_ids,
    somewhere,
    unanimous,
)
from report.statistics import FEWEST_SEEDS, Interval, exponential, mean_interval
from report.tables.cells import shares_process
from report.tables.choice import all_cells
from report.tables.e_logits import overflows
from report.tables.f_padding import favourite, padding_of, real_tokens_known
from report.tables.selection import REFERENCE, TASK_COLUMNS, column_of, is_bucketed, is_control, is_lm, series_order
from report.tables.speed import group_scores, y_kind
from report.text import bounds, gigabytes

P1 = "Classification heads overflow fp16: some logit passes 65,504."


def judge_p1(base: EvidenceBase) -> Finding:
    """Per classification case, over all configurations: with how many seeds some logit left fp16's range."""
    evidence = [e for case, run in base.cases.items() if not is_lm(run) and (e := _p1_evidence(base, case)) is not None]
    missing = "classification runs with logged logits, seeds 0 1 2"
    return finding("P1", P1, "E", "share of 65,504", evidence, somewhere(evidence), missing)


def _p1_evidence(base: EvidenceBase, case: str) -> Evidence | None:
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


P2 = "bf16_pure is top-left: in every case no other configuration is faster or needs less memory."
CONFIG = "bf16_pure"
SMALLEST_LEAD = math.log(1.02)
"""A rival within 2 % of its speed is no faster."""
MEMORY_TOLERANCE = 1.01


def judge_p2(base: EvidenceBase) -> Finding:
    """Every case with a healthy reference. Within a case the FLOPs are equal, so the ratio of MFU against
    one peak is that of samples/s. Memory is the allocator's peak: resident memory is no VRAM."""
    evidence, notes = [], []
    for case in base.cases:
        if case in base.judgements.unhealthy:
            notes.append(f"{case} is not judged: its reference is unhealthy.")
        elif (found := _p2_evidence(base, case)) is not None:
            evidence.append(found)
    missing = "a GPU (peak memory of the allocator), a healthy fp32_true, seeds 0 1 2"
    return finding("P2", P2, "B", "speed over its best rival", evidence, everywhere(evidence), missing, notes)


def _p2_evidence(base: EvidenceBase, case: str) -> Evidence | None:
    ours, reference = base.timed(case, CONFIG), base.timed(case, REFERENCE)
    rivals = {
        config: cell
        for config in series_order({run.dtype_config for run in base.selection.of_case(case)})
        if config != CONFIG and not is_control(config) and (cell := base.timed(case, config))
    }
    if not ours or not rivals:
        return None
    gains = {config: log_speed_ratios(cell, reference) for config, cell in rivals.items()}
    own = log_speed_ratios(ours, reference)
    leads = {config: difference(own, gain) for config, gain in gains.items()}
    leads = {config: lead for config, lead in leads.items() if lead.n}
    if not leads:
        return None
    rival = min(leads, key=lambda config: leads[config].value)
    lead = leads[rival]
    speed = _worst([_no_slower(each) for each in leads.values()])
    memory, memory_text = _memory(ours, rivals)
    verdict = _worst([speed, memory])
    shown = exponential(lead)
    sentence = f"{CONFIG} runs {shown.value:.2f}x {bounds(shown, '.2f')} as fast as {rival}, its best rival; {memory_text}."
    return Evidence(case, verdict, shown, sentence, run_ids(ours, *rivals.values()))


def _no_slower(lead: Interval) -> str:
    """The verdict on "no rival is faster" for one rival: a lead that excludes a deficit of 2 %."""
    if lead.n < FEWEST_SEEDS or not lead.known:
        return NOT_DECIDED
    if lead.above(-SMALLEST_LEAD):
        return SUPPORTED
    return REFUTED if lead.below(0.0) else NOT_DECIDED


def _worst(verdicts: list[str]) -> str:
    return next((v for v in (REFUTED, NOT_DECIDED) if v in verdicts), SUPPORTED)


def _memory(ours: BySeed, rivals: dict[str, BySeed]) -> tuple[str, str]:
    """Whether no rival needs less memory. Peaks repeat from seed to seed, so the seeds' largest is compared."""
    cells = {CONFIG: ours, **rivals}
    peaks = {config: [run.peak_allocated_bytes for run in cell.values()] for config, cell in cells.items()}
    if any(None in values for values in peaks.values()):
        return NOT_DECIDED, "its memory on a GPU was not measured"
    if any(shares_process(run) for cell in cells.values() for run in cell.values()):
        return NOT_DECIDED, "its peak memory is not known, since its runs shared a process with others"
    least = min(rivals, key=lambda config: max(peaks[config]))
    text = f"it needs {gigabytes(max(peaks[CONFIG]))}, the leanest rival ({least}) {gigabytes(max(peaks[least]))}"
    if len(ours) < FEWEST_SEEDS:
        return NOT_DECIDED, text
    return (SUPPORTED if max(peaks[CONFIG]) <= MEMORY_TOLERANCE * max(peaks[least]) else REFUTED), text


P3 = "Classification uses the machine less, and less evenly, than language modelling (MFU of real tokens)."
SMALLEST_LOG = math.log(1.02)
SMALLEST_CV = 0.005
"""A coefficient of variation that is less than half a point higher is not noisier."""


def judge_p3(base: EvidenceBase) -> Finding:
    """Per classification case against its architecture's language model, without batching by length."""
    plain = EvidenceBase.of(base.folder, lambda run: not is_bucketed(run) and real_tokens_known(run))
    timed = [
        run
        for case in plain.cases
        for config in {r.dtype_config for r in plain.selection.of_case(case)}
        for run in plain.timed(case, config).values()
    ]
    config, kind = favourite(timed), y_kind(timed)
    evidence, notes = [], []
    if kind is None:
        notes.append("MFU was not measured; tokens per second of two tasks are no MFU and are not compared.")
    for case, run in plain.cases.items():
        model = next((c for c, r in plain.cases.items() if is_lm(r) and r.arch == run.arch), None)
        if kind is not None and not is_lm(run) and model is not None:
            found = _p3_evidence(plain, plain.timed(case, config), plain.timed(model, config), f"{case} / {model}", kind)
            evidence += [found] if found else []
    missing = f"{config} with a measured MFU on a classification case and its architecture's language model, seeds 0 1 2"
    return finding("P3", P3, "F", "MFU relative to the language model", evidence, unanimous(evidence), missing, notes)


def _p3_evidence(base: EvidenceBase, classification: BySeed, model: BySeed, place: str, kind: str) -> Evidence | None:
    padding = [{seed: padding_of(base.folder, run, kind) for seed, run in cell.items()} for cell in (classification, model)]
    rates, variations = (
        [{seed: row[name] for seed, row in rows.items() if math.isfinite(row[name])} for rows in padding]
        for name in ("rate_real", "cv_real")
    )
    logs = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in rates]
    lower, noisier = difference(logs[1], logs[0]), difference(*variations)
    if lower.n == 0 or noisier.n == 0:
        return None
    shown = exponential(lower.negated())
    sentence = (
        f"classification reaches {shown.value:.2f} {bounds(shown, '.2f')} of the language model's MFU, and its "
        f"coefficient of variation is {noisier.value:+.3f} {bounds(noisier, '+.3f')} higher"
        f"{_lengths(classification, model)}."
    )
    verdict = _both(decide(lower, SMALLEST_LOG), decide(noisier, SMALLEST_CV))
    return Evidence(place, verdict, shown, sentence, run_ids(classification, model))


def _both(lower: str, noisier: str) -> str:
    """The claim has two parts: both must hold, and one that does not hold refutes it."""
    if REFUTED in (lower, noisier):
        return REFUTED
    return SUPPORTED if lower == noisier == SUPPORTED else NOT_DECIDED


def _lengths(*cells: BySeed) -> str:
    """A note when the two tasks have sequences of other lengths."""
    lengths = [next(iter(cell.values())).seq_len for cell in cells]
    return "" if lengths[0] == lengths[1] else f" (sequence length {lengths[0]} against {lengths[1]})"


P4 = "The best configuration changes with the task: one that is fastest on one task is not on another."
SMALLEST_SHIFT = math.log(1.02)
"""Within 2 % of the fastest a configuration serves as well."""

ByConfig = dict[str, list[float]]


def judge_p4(base: EvidenceBase) -> Finding:
    """Pairs of tasks, among configurations that completed both with good quality."""
    cells = all_cells(base.folder)
    good = [
        run
        for run in base.selection.runs
        if base.state(run) == "completed" and base.is_timed(run) and not cells[run.case, run.dtype_config].poor
    ]
    scores = group_scores(good, column_of)
    columns = [column for column in TASK_COLUMNS if len(scores.get(column, {})) > 1]
    evidence = [
        e
        for first, second in combinations(columns, 2)
        if (e := _p4_evidence(first, second, scores[first], scores[second])) is not None
    ]
    run_ids = tuple(run.run_id for run in good)
    evidence = [Evidence(e.place, e.verdict, e.interval, e.sentence, run_ids) for e in evidence]
    missing = "two tasks with healthy references and two configurations each, seeds 0 1 2"
    return finding(
        "P4",
        P4,
        "H",
        "speed of the one task's best on the other, relative to that one's best",
        evidence,
        somewhere(evidence),
        missing,
    )


def _p4_evidence(first: str, second: str, scores: ByConfig, others: ByConfig) -> Evidence | None:
    """One pair of tasks: is there one configuration for both?"""
    common = [config for config in scores if config in others]
    if len(common) < 2:
        return None
    sides = [{config: side[config] for config in common} for side in (scores, others)]
    best = [max(common, key=lambda config, side=side: float(np.mean(side[config]))) for side in sides]
    lead_first, lead_second = (_lead(side, *pair) for side, pair in zip(sides, (best, best[::-1]), strict=True))
    n = min(len(side[common[0]]) for side in sides)
    loss = exponential(lead_second.negated())
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


def _serves(side: ByConfig, config: str) -> bool:
    """Whether no other configuration is faster by 2 % or more, with certainty."""
    return all(_lead(side, rival, config).below(SMALLEST_SHIFT) for rival in side if rival != config)
