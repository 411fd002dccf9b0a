"""Configurations to stay away from in a task, each with its reason."""

from __future__ import annotations

from collections import Counter

from instrument.terminal import count
from report.hypotheses.evidence_base import EvidenceBase, log_ratios
from report.statistics.interval import FEWEST_SEEDS, exponential, mean_interval
from report.tables.columns import REFERENCE, is_control, series_order
from report.tables.judgement import Judged, death_words
from report.words import times


def to_avoid(base: EvidenceBase, cases: tuple[str, ...]) -> tuple[str, ...]:
    """``config: reason``, worst reason first a configuration; controls are not mentioned."""
    configs = [
        config
        for config in series_order({run.dtype_config for run in base.selection.runs if run.case in cases})
        if config != REFERENCE and not is_control(config)
    ]
    return tuple(f"{config}: {reason}" for config in configs if (reason := _reason(base, cases, config)) is not None)


def _reason(base: EvidenceBase, cases: tuple[str, ...], config: str) -> str | None:
    judged = [j for case in cases for j in base.judgements.of(case, config) if j.state != "unfinished"]
    for state in ("diverged", "poor"):
        bad = [j for j in judged if j.state == state]
        if bad:
            return f"{_words(bad[0], state)} ({len(bad)} of {count(len(judged), 'run')})"
    ends = Counter(j.run.status for j in judged if j.state == "failed" and not _is_an_accident(base, j))
    if ends:
        return ", ".join(f"{status} ({n} of {count(len(judged), 'run')})" for status, n in ends.most_common())
    return _slow(base, cases, config)


def _is_an_accident(base: EvidenceBase, failed: Judged) -> bool:
    """Nothing that the configuration did: the reference of its case ended alike."""
    return any(
        j.state == "failed" and j.run.status == failed.run.status for j in base.judgements.of(failed.run.case, REFERENCE)
    )


def _words(judged: Judged, state: str) -> str:
    if state == "diverged":
        first = judged.run.first_nonfinite
        return death_words(judged.run) + (f", {first.phase}" if first else "")
    return judged.reason.replace(" against fp32_true", "")


def _slow(base: EvidenceBase, cases: tuple[str, ...], config: str) -> str | None:
    """Slower than fp32_true in some case, resolved by three seeds or more."""
    for case in cases:
        gains = log_ratios(base.timed(case, config), base.timed(case, REFERENCE), lambda run: run.samples_per_s)
        speed = mean_interval([*gains.values()])
        if speed.n >= FEWEST_SEEDS and speed.below(0.0):
            return f"slower than fp32_true, {times(exponential(speed))} on {case}"
    return None
