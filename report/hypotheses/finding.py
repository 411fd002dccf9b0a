"""A claim judged: supported, refuted, or not decided by these data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from report.statistics.interval import FEWEST_SEEDS, NOTHING, Interval

SUPPORTED, REFUTED, NOT_DECIDED = "supported", "refuted", "not decided"


@dataclass(frozen=True)
class Evidence:
    """One place where the claim can be tested (a case, an architecture): its verdict and why."""

    place: str
    verdict: str
    interval: Interval
    sentence: str
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """``effect`` with ``low`` and ``high`` in ``unit``, over ``n`` paired seeds; ``would_decide`` says
    what data are missing, and is empty when the verdict stands. ``plot``: the letter beside it."""

    id: str
    claim: str
    verdict: str
    sentence: str
    effect: float | None
    low: float | None
    high: float | None
    unit: str | None
    n: int
    run_ids: tuple[str, ...]
    would_decide: str
    plot: str
    details: tuple[str, ...] = ()


def decide(interval: Interval, smallest: float) -> str:
    """The verdict on "there is a positive effect". Refuted: the whole interval lies below ``smallest``, the
    least effect worth the name, be it resolved or not. Supported: it lies above 0. An interval around 0
    that is wider than that decides nothing."""
    if interval.n < FEWEST_SEEDS or not interval.known:
        return NOT_DECIDED
    if interval.below(smallest):
        return REFUTED
    return SUPPORTED if interval.above(0.0) else NOT_DECIDED


def decide_count(hits: int, n: int) -> str:
    """The verdict on "it happens" when it happened with ``hits`` of ``n`` seeds: all or none decides."""
    if n < FEWEST_SEEDS or 0 < hits < n:
        return NOT_DECIDED
    return SUPPORTED if hits else REFUTED


def unanimous(evidence: Sequence[Evidence]) -> str:
    """Supported or refuted where all places agree; a split or an undecided place decides nothing."""
    verdicts = {e.verdict for e in evidence}
    return verdicts.pop() if len(verdicts) == 1 else NOT_DECIDED


def everywhere(evidence: Sequence[Evidence]) -> str:
    """The verdict on "in every place": one place refutes it."""
    if any(e.verdict == REFUTED for e in evidence):
        return REFUTED
    return unanimous(evidence)


def somewhere(evidence: Sequence[Evidence]) -> str:
    """The verdict on "in some place": one place supports it, all must refute it."""
    if any(e.verdict == SUPPORTED for e in evidence):
        return SUPPORTED
    return unanimous(evidence)


def finding(
    id: str,
    claim: str,
    plot: str,
    unit: str,
    evidence: Sequence[Evidence],
    verdict: str,
    *,
    missing: str,
    more: Sequence[str] = (),
) -> Finding:
    """A finding that speaks for the place which decides it (else for the one with most seeds).

    ``missing`` says what would decide it; where there is no evidence at all it is the sentence too.
    """
    deciding = [e for e in evidence if e.verdict == verdict] or list(evidence)
    speaker = max(deciding, key=lambda e: e.interval.n, default=Evidence("", NOT_DECIDED, NOTHING, f"Not tested: {missing}"))
    value = speaker.interval
    known = value.n > 0
    return Finding(
        id,
        claim,
        verdict if evidence else NOT_DECIDED,
        _sentence(verdict, speaker, evidence),
        value.value if known else None,
        value.low if value.known else None,
        value.high if value.known else None,
        unit if known else None,
        value.n,
        tuple(dict.fromkeys(i for e in evidence for i in e.run_ids)),
        missing if verdict == NOT_DECIDED or not evidence else "",
        plot,
        (*(f"{e.place}: {e.verdict}. {e.sentence}" for e in evidence), *more),
    )


def _sentence(verdict: str, speaker: Evidence, evidence: Sequence[Evidence]) -> str:
    verdicts = {e.verdict for e in evidence}
    if verdict == NOT_DECIDED and {SUPPORTED, REFUTED} <= verdicts:
        supported = ", ".join(e.place for e in evidence if e.verdict == SUPPORTED)
        refuted = ", ".join(e.place for e in evidence if e.verdict == REFUTED)
        return f"The evidence is split: supported for {supported}; refuted for {refuted}."
    place = f"{speaker.place}: " if speaker.place else ""
    return place + speaker.sentence
