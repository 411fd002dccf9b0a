"""The benchmark's hypotheses: H1 loss-scale inversion, H2 architecture inversion, H3 bottleneck instability."""

from __future__ import annotations

import math
from collections.abc import Callable

from bench_cases import DTYPE_CONFIGS
from instrument.results.schemas import RunRecord
from report.hypotheses.evidence import (
    BySeed,
    Evidence,
    EvidenceBase,
    Finding,
    difference,
    finding,
    log_speed_ratios,
    run_ids,
    seen,
    unanimous,
)
from report.significance import Test, above, all_of, any_of, below, more_often, rate_above, rate_below
from report.statistics import Interval, exponential, mean_interval, share_interval
from report.tables.cells import COMPLETED, FAILING, STALLED, Cell, Quality
from report.tables.judgement import MARGIN_SPEED, divergence_text
from report.tables.selection import REFERENCE, column_of, is_control, is_lm, series_order
from report.text import bounds, joined

H1 = "Loss-scale inversion: fp16_naive trains on single-label classification and diverges on multi-label."
STRESSED, CLEAN = "fp16_naive", "fp16_naive_fp32_states"
SETTLED = ("completed", "diverged", "stalled")


def judge_h1(base: EvidenceBase) -> Finding:
    """Per architecture and loss reduction, seed by seed: more often than rarely? Where AdamW's epsilon makes fp16_naive diverge
    in both tasks, the control with fp32 AdamW states is judged instead: it shows what precision itself does."""
    evidence, notes = [], []
    pairs = _pairs(base, lambda run: column_of(run) == "Cls-Single", lambda run: column_of(run) == "Cls-Multi", _same_arch)
    for single, multi in pairs:
        run = base.cases[multi]
        place = f"{run.arch}, {run.loss_reduction}"
        found = _h1_evidence(base, single, multi, place)
        why = found and (base.healthy(single, multi) or _unlike(base, found))
        notes += [f"{place} is not judged: {why}."] if why else []
        evidence += [found] if found and not why else []
        lines = (_line(base, single, multi, place, config) for config in (STRESSED, *DTYPE_CONFIGS[STRESSED].controls))
        notes += [line for line in lines if line is not None]
    missing = (
        f"single- and multi-label runs (mean and label_sum) of {STRESSED} and its controls beside a healthy {REFERENCE}, "
        "seeds 0 1 2"
    )
    return finding(base, "H1", H1, "G", "share of seeds with the inversion", evidence, unanimous, missing, notes)


def _pairs(
    base: EvidenceBase,
    first: Callable[[RunRecord], bool],
    second: Callable[[RunRecord], bool],
    match: Callable[[RunRecord, RunRecord], bool],
) -> list[tuple[str, str]]:
    """Pairs of cases, each by one of its runs, that belong together."""
    return [
        (one, two)
        for one, run in base.cases.items()
        if first(run)
        for two, other in base.cases.items()
        if second(other) and match(run, other)
    ]


def _same_arch(run: RunRecord, other: RunRecord) -> bool:
    return run.arch == other.arch


def _unlike(base: EvidenceBase, evidence: Evidence) -> str | None:
    return base.unlike({at: base.folder.by_id[run_id] for at, run_id in enumerate(evidence.run_ids)})


def _settled(base: EvidenceBase, single: str, multi: str, config: str) -> tuple[BySeed, BySeed]:
    """Runs of both cases that completed, stalled or diverged, for the seeds that both have."""
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
    hits = sum(_trains(base, cells[0][seed]) and cells[1][seed].status == "diverged" for seed in cells[0])
    share = share_interval(hits, len(cells[0]))
    what = seen(hits, share.n, f"{judged} trains on single-label and diverges on multi-label")
    tests = rate_above(hits, share.n), rate_below(hits, share.n)
    return Evidence(place, *tests, share, f"{why}{what} {bounds(share, '.2f')}.", run_ids(*cells))


def _trains(base: EvidenceBase, run: RunRecord) -> bool:
    return run.status == "completed" and base.state(run) != "stalled"


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


def judge_h2(base: EvidenceBase) -> Finding:
    """Pairs of cases with one task, one reduction and one sequence length. The denominator is common:
    the gain is samples/s over fp32_true's, which for one case is the ratio of MFU against one peak."""
    evidence, not_compared = [], []
    for roberta in (run for run in base.cases.values() if run.arch == LARGE):
        gpt2 = _counterpart(base, roberta)
        if gpt2 is None:
            continue
        # GPT-2's runs at RoBERTa's sequence length, perhaps those of a control variant of the case.
        small = EvidenceBase.of(
            base.folder, lambda run, gpt2=gpt2, roberta=roberta: run.case == gpt2.case and run.seq_len == roberta.seq_len
        )
        found = _h2_evidence(small, base, gpt2.case, roberta)
        why = None if small.selection.runs else f"sequence length {gpt2.seq_len} against {roberta.seq_len}"
        why = why or (found and _unlike(base, found))
        not_compared += [f"{gpt2.case} and {roberta.case} are not compared: {why}."] if why else []
        evidence += [found] if found and not why else []
    missing = (
        f"{CONFIG} and {REFERENCE} of both architectures at one sequence length and batch size on one machine, seeds 0 1 2 "
        "(for LM: gpt2_clm with --seq-len 512)"
    )
    return finding(base, "H2", H2, "B", "ratio of gains", evidence, unanimous, missing, not_compared)


def _counterpart(base: EvidenceBase, roberta: RunRecord) -> RunRecord | None:
    """GPT-2's case of the same kind: a language model beside a language model, else the same task."""
    return next(
        (
            run
            for run in base.cases.values()
            if run.arch == SMALL
            and (is_lm(run) and is_lm(roberta) if is_lm(run) or is_lm(roberta) else _same_task(run, roberta))
        ),
        None,
    )


def _same_task(run: RunRecord, other: RunRecord) -> bool:
    return (column_of(run), run.loss_reduction) == (column_of(other), other.loss_reduction)


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
    leads = [gains[0][seed] - gains[1][seed] for seed in sorted(gains[0].keys() & gains[1].keys())]
    tests = above(leads, MARGIN_SPEED), below(leads, MARGIN_SPEED)
    return Evidence(f"{roberta.case} / {gpt2}", *tests, shown, sentence, run_ids(*cells))


H3 = "Bottleneck instability: GPT-2 classification needs more precision than RoBERTa classification."


def judge_h3(base: EvidenceBase) -> Finding:
    """Per 16-bit configuration, GPT-2 against RoBERTa: who fails more often (Fisher's exact test), and where neither fails, who
    loses more against its fp32_true. 8-bit optimizer states and controls are listed apart."""
    evidence, notes = [], []
    pairs = _pairs(
        base,
        lambda run: run.arch == SMALL and not is_lm(run),
        lambda run: run.arch == LARGE and not is_lm(run),
        _same_task,
    )
    for gpt2, roberta in pairs:
        place = f"{column_of(base.cases[gpt2])}, {base.cases[gpt2].loss_reduction}"
        found, apart = _h3_evidence(base, gpt2, roberta, place)
        notes += apart
        why = base.healthy(gpt2, roberta) or (found and _unlike(base, found))
        notes += [f"{place} is not judged: {why}."] if why else []
        evidence += [found] if found and not why else []
    missing = "classification runs of both architectures in 16-bit configurations beside a healthy fp32_true, seeds 0 1 2"
    return finding(base, "H3", H3, "A", "difference of the shares of seeds that fail", evidence, unanimous, missing, notes)


def _h3_evidence(base: EvidenceBase, gpt2: str, roberta: str, place: str) -> tuple[Evidence | None, list[str]]:
    more, less, neither, lines, apart, ids = [], [], [], [], [], []
    widest = (0.0, Interval(math.nan, math.nan, math.nan, 0))
    for config in series_order({config for _, config in base.cells}):
        cells = base.cells.get((gpt2, config)), base.cells.get((roberta, config))
        declared = DTYPE_CONFIGS.get(config)
        if declared is None or declared.compute == "fp32" or not all(cell and cell.state in ENDED for cell in cells):
            continue
        ours, theirs = (cell for cell in cells if cell)
        line = f"{config}: {_outcome(ours)} on GPT-2, {_outcome(theirs)} on RoBERTa"
        if is_control(config) or declared.optimizer == "8bit":
            apart.append(f"{place}, apart: {line}.")
            continue
        tests = _needs_more(ours, theirs)
        more.append(tests[0])
        less.append(tests[1])
        neither.append(tests[2])
        lines.append(line)
        ids += [*ours.run_ids, *theirs.run_ids]
        gap = ours.failure_share.value - theirs.failure_share.value
        widest = max(widest, (abs(gap), Interval(gap, math.nan, math.nan, min(ours.n, theirs.n))), key=lambda item: item[0])
        if not widest[1].n:
            widest = (0.0, Interval(0.0, math.nan, math.nan, min(ours.n, theirs.n)))
    if not lines:
        return None, apart
    supports, refutes = any_of(more), any_of([any_of(less), all_of(neither)])
    return Evidence(place, supports, refutes, widest[1], "; ".join(lines) + ".", tuple(ids)), apart


ENDED = (COMPLETED, FAILING, STALLED)


def _needs_more(ours: Cell, theirs: Cell) -> tuple[Test, Test, Test]:
    """The tests of "GPT-2 fails more", "RoBERTa fails more" and "GPT-2 does not fail more" for one configuration."""
    if ours.n_failed or theirs.n_failed:
        counts = (ours.n_failed, ours.n), (theirs.n_failed, theirs.n)
        return more_often(*counts[0], *counts[1]), more_often(*counts[1], *counts[0]), rate_below(ours.n_failed, ours.n)
    both = [(a, b) for a in ours.judged_qualities for b in theirs.judged_qualities if a.name == b.name]
    if not both:
        return any_of([]), any_of([]), any_of([])
    mine, other = both[0]
    gaps = [mine.worse[seed] - other.worse[seed] for seed in sorted(mine.worse.keys() & other.worse.keys())]
    rounding = math.hypot(mine.resolution, other.resolution)
    lost = [-gap for gap in gaps]
    kept = all_of([below(gaps, mine.margin, rounding), rate_below(0, ours.n)])
    return above(gaps, mine.margin, rounding), above(lost, mine.margin, rounding), kept


def _outcome(cell: Cell) -> str:
    if cell.n_failed:
        return f"{cell.what} in {cell.n_failed} of {cell.n}"
    gap = next((q for q in cell.judged_qualities if q.difference.n), None)
    return f"no failure seen in {cell.n}" + (f" ({_gap(gap)})" if gap else "")


def _gap(quality: Quality) -> str:
    """``+1.2 [+0.9, +1.5] points of micro-F1 lost``, ``+3.1 [+2.0, +4.2] % more loss``."""
    found = mean_interval([*quality.worse.values()])
    scaled = Interval(100 * found.value, 100 * found.low, 100 * found.high, found.n)
    what = f"points of {quality.name} lost" if quality.unit == "F1" else f"% more {quality.name}"
    return f"{scaled.value:+.1f} {bounds(scaled, '+.1f')} {what}"
