"""P3 (plot F): classification's MFU of real tokens is lower and noisier than language modelling's."""

from __future__ import annotations

import math

from report.hypotheses.evidence_base import BySeed, EvidenceBase, difference, ids
from report.hypotheses.finding import NOT_DECIDED, REFUTED, SUPPORTED, Evidence, Finding, decide, finding, unanimous
from report.statistics.interval import Interval, exponential
from report.tables.columns import is_lm
from report.tables.f_padding import favourite, padding_of, real_tokens_known
from report.tables.selection import is_bucketed
from report.tables.utilisation import y_kind
from report.words import bounds

CLAIM = "Classification uses the machine less, and less evenly, than language modelling (MFU of real tokens)."
SMALLEST_LOG = math.log(1.02)
SMALLEST_CV = 0.005
"""A coefficient of variation that is less than half a point higher is not noisier."""


def judge(base: EvidenceBase) -> Finding:
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
            found = _place(plain, plain.timed(case, config), plain.timed(model, config), f"{case} / {model}", kind)
            evidence += [found] if found else []
    return finding(
        "P3",
        CLAIM,
        "F",
        "MFU relative to the language model",
        evidence,
        unanimous(evidence),
        more=notes,
        missing=f"{config} with a measured MFU on a classification case and its architecture's language model, seeds 0 1 2",
    )


def _place(base: EvidenceBase, classification: BySeed, model: BySeed, place: str, kind: str) -> Evidence | None:
    padding = [{seed: padding_of(base.folder, run, kind) for seed, run in cell.items()} for cell in (classification, model)]
    rates, variations = (
        [{seed: row[name] for seed, row in rows.items() if math.isfinite(row[name])} for rows in padding]
        for name in ("rate_real", "cv_real")
    )
    logs = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in rates]
    lower, noisier = difference(logs[1], logs[0]), difference(*variations)
    if lower.n == 0 or noisier.n == 0:
        return None
    shown = exponential(Interval(-lower.value, -lower.high, -lower.low, lower.n))
    sentence = (
        f"classification reaches {shown.value:.2f} {bounds(shown, '.2f')} of the language model's MFU, and its "
        f"coefficient of variation is {noisier.value:+.3f} {bounds(noisier, '+.3f')} higher"
        f"{_lengths(classification, model)}."
    )
    verdict = _both(decide(lower, SMALLEST_LOG), decide(noisier, SMALLEST_CV))
    return Evidence(place, verdict, shown, sentence, ids(classification, model))


def _both(lower: str, noisier: str) -> str:
    """The claim has two parts: both must hold, and one that does not hold refutes it."""
    if REFUTED in (lower, noisier):
        return REFUTED
    return SUPPORTED if lower == noisier == SUPPORTED else NOT_DECIDED


def _lengths(*cells: BySeed) -> str:
    """A note when the two tasks have sequences of other lengths."""
    lengths = [next(iter(cell.values())).seq_len for cell in cells]
    return "" if lengths[0] == lengths[1] else f" (sequence length {lengths[0]} against {lengths[1]})"
