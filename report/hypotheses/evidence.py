"""Evidence for a claim, and the rules that turn it into a finding: supported, refuted, or not decided by these data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.statistics import FEWEST_SEEDS, NOTHING, Interval, mean_interval
from report.tables.judgement import Judgements, judge_runs
from report.tables.selection import Selection, case_order, incomparable_reason, select
from report.tables.speed import eligible

SUPPORTED, REFUTED, NOT_DECIDED = "supported", "refuted", "not decided"
BySeed = dict[int, RunRecord]


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
    missing: str,
    notes: Sequence[str] = (),
) -> Finding:
    """A finding with the sentence of the place that decides it (else of the one with most seeds).

    ``missing`` says what would decide it; where there is no evidence at all it is the sentence too."""
    deciding = [e for e in evidence if e.verdict == verdict] or list(evidence)
    chosen = max(deciding, key=lambda e: e.interval.n, default=Evidence("", NOT_DECIDED, NOTHING, f"Not tested: {missing}"))
    value = chosen.interval
    measured = value.n > 0
    return Finding(
        id,
        claim,
        verdict if evidence else NOT_DECIDED,
        _split(verdict, evidence) or (f"{chosen.place}: " if chosen.place else "") + chosen.sentence,
        value.value if measured else None,
        value.low if value.known else None,
        value.high if value.known else None,
        unit if measured else None,
        value.n,
        tuple(dict.fromkeys(i for e in evidence for i in e.run_ids)),
        missing if verdict == NOT_DECIDED or not evidence else "",
        plot,
        (*(f"{e.place}: {e.verdict}. {e.sentence}" for e in evidence), *notes),
    )


def _split(verdict: str, evidence: Sequence[Evidence]) -> str | None:
    """A sentence for places that contradict one another; None where they do not."""
    places = {kind: ", ".join(e.place for e in evidence if e.verdict == kind) for kind in (SUPPORTED, REFUTED)}
    if verdict != NOT_DECIDED or not all(places.values()):
        return None
    return f"The evidence is split: supported for {places[SUPPORTED]}; refuted for {places[REFUTED]}."


@dataclass(frozen=True)
class EvidenceBase:
    """One selection of a folder's runs."""

    folder: Folder
    selection: Selection

    @classmethod
    def of(cls, folder: Folder, keep: Callable[[RunRecord], bool] = lambda run: True) -> EvidenceBase:
        """The main variant of every case among the runs that ``keep`` takes."""
        return cls(folder, select(folder, keep))

    @cached_property
    def judgements(self) -> Judgements:
        """Every run's state."""
        return judge_runs(self.folder, self.selection)

    @cached_property
    def _timed(self) -> frozenset[str]:
        return frozenset(run.run_id for run in eligible(self.folder, self.selection)[0])

    @property
    def cases(self) -> dict[str, RunRecord]:
        """Case ids in the registry's order, each with one of its runs to read its settings from."""
        one = {run.case: run for run in self.selection.runs}
        return {case: one[case] for case in case_order(one)}

    def runs(self, case: str, config: str) -> BySeed:
        """The runs of a cell by seed."""
        return {run.seed: run for run in self.selection.runs if (run.case, run.dtype_config) == (case, config)}

    def timed(self, case: str, config: str) -> BySeed:
        """The runs of a cell that may enter a figure of speed, by seed."""
        return {seed: run for seed, run in self.runs(case, config).items() if self.is_timed(run)}

    def is_timed(self, run: RunRecord) -> bool:
        """Whether a run may enter a figure of speed."""
        return run.run_id in self._timed

    def state(self, run: RunRecord) -> str:
        """A run's judged state."""
        return self.judgements.by_id[run.run_id].state


def log_speed_ratios(over: BySeed, under: BySeed) -> dict[int, float]:
    """log(samples/s over samples/s) for every seed that both have and whose rows may be compared."""
    return {
        seed: float(np.log(over[seed].samples_per_s / under[seed].samples_per_s))
        for seed in sorted(over.keys() & under.keys())
        if over[seed].samples_per_s and under[seed].samples_per_s and incomparable_reason(over[seed], under[seed]) is None
    }


def difference(first: dict[int, float], second: dict[int, float]) -> Interval:
    """t-interval of first - second over the seeds that both have."""
    seeds = sorted(first.keys() & second.keys())
    return mean_interval([first[seed] - second[seed] for seed in seeds]) if seeds else NOTHING


def run_ids(*cells: BySeed) -> tuple[str, ...]:
    """Run ids of some cells."""
    return tuple(run.run_id for cell in cells for run in cell.values())
