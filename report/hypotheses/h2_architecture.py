"""H2, architecture inversion: bf16_pure gains more on RoBERTa than on GPT-2."""

from __future__ import annotations

import math

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.hypotheses.evidence_base import EvidenceBase, difference, ids, log_ratios
from report.hypotheses.finding import Evidence, Finding, decide, finding, unanimous
from report.statistics.interval import exponential
from report.tables.columns import REFERENCE, column_of, is_lm
from report.words import bounds, joined

CLAIM = "Architecture inversion: bf16_pure speeds RoBERTa up more than GPT-2, relative to fp32_true."
CONFIG, SMALL, LARGE = "bf16_pure", "gpt2", "roberta"
SMALLEST = math.log(1.02)
"""A gain that is less than 2 % larger is no inversion."""


def judge(base: EvidenceBase) -> Finding:
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
        elif (found := _place(partner, base, gpt2.case, roberta)) is not None:
            evidence.append(found)
    return finding(
        "H2",
        CLAIM,
        "B",
        "ratio of gains",
        evidence,
        unanimous(evidence),
        more=not_compared,
        missing=f"{CONFIG} and {REFERENCE} of both architectures at one sequence length, seeds 0 1 2 "
        "(for LM: gpt2_clm with --seq-len 512)",
    )


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


def _place(small: EvidenceBase, large: EvidenceBase, gpt2: str, roberta: RunRecord) -> Evidence | None:
    gains, cells = [], []
    for base, case in ((large, roberta.case), (small, gpt2)):
        pure, reference = base.timed(case, CONFIG), base.timed(case, REFERENCE)
        gains.append(log_ratios(pure, reference, lambda run: run.samples_per_s))
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
    return Evidence(f"{roberta.case} / {gpt2}", decide(ratio, SMALLEST), shown, sentence, ids(*cells))
