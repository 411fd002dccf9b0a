"""Evidence for a claim, and the rules that turn it into a finding: supported, refuted, or not decided by these data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instrument.results.contents import Folder, is_cpu
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.significance import FEWEST_SEEDS, UNTESTED, Test, all_of, any_of
from report.statistics import NOTHING, Interval, mean_interval
from report.tables.cells import COMPLETED, Cell
from report.tables.choice import all_cells
from report.tables.judgement import Judgements, judge_runs
from report.tables.selection import REFERENCE, Selection, case_order, incomparable_reason, select, unlike_reason
from report.tables.speed import eligible
from report.text import joined

SUPPORTED, REFUTED, NOT_DECIDED = "supported", "refuted", "not decided"
BySeed = dict[int, RunRecord]


@dataclass(frozen=True)
class Evidence:
    """One place where the claim can be tested (a case, an architecture): the tests that it holds there and that it does not,
    the effect with its interval, and both in a sentence."""

    place: str
    supports: Test
    refutes: Test
    interval: Interval
    sentence: str
    run_ids: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What this place alone says."""
        return verdict_of(self.supports, self.refutes)


@dataclass(frozen=True)
class Finding:
    """``effect`` with ``low`` and ``high`` in ``unit``, over ``n`` seeds; ``would_decide`` says what data are missing, and is
    empty when the verdict stands; ``seeds``: how many would decide it with a power of 80 %, were the effect as measured, None
    where more seeds would not. ``plot``: the letter beside it."""

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
    seeds: int | None = None


def verdict_of(supports: Test, refutes: Test) -> str:
    """What two opposite tests say; both shown is no verdict."""
    if supports.shown == refutes.shown:
        return NOT_DECIDED
    return SUPPORTED if supports.shown else REFUTED


Rule = Callable[[Sequence[Evidence]], tuple[Test, Test]]


def unanimous(evidence: Sequence[Evidence]) -> tuple[Test, Test]:
    """Supported or refuted where all places agree."""
    return all_of(e.supports for e in evidence), all_of(e.refutes for e in evidence)


def everywhere(evidence: Sequence[Evidence]) -> tuple[Test, Test]:
    """The claim "in every place": one place refutes it."""
    return all_of(e.supports for e in evidence), any_of(e.refutes for e in evidence)


def somewhere(evidence: Sequence[Evidence]) -> tuple[Test, Test]:
    """The claim "in some place": one place supports it, all must refute it."""
    return any_of(e.supports for e in evidence), all_of(e.refutes for e in evidence)


def finding(
    base: EvidenceBase,
    id: str,
    claim: str,
    plot: str,
    unit: str,
    evidence: Sequence[Evidence],
    rule: Rule,
    missing: str,
    notes: Sequence[str] = (),
) -> Finding:
    """A finding with the sentence of the place that decides it (else of the one with most seeds).

    ``missing`` says what would decide it; where there is no evidence at all it is the sentence too. Runs of the tiny preset or
    of a processor show what happened there and decide nothing about GPUs."""
    toys = [e for e in evidence if base.about_toys(e.run_ids)]
    tests = rule(evidence) if evidence and not toys else (UNTESTED, UNTESTED)
    verdict = verdict_of(*tests)
    deciding = [e for e in evidence if not toys and e.verdict == verdict] or list(evidence)
    chosen = max(
        deciding,
        key=lambda e: (e.interval.n, -min(e.supports.p, e.refutes.p)),
        default=Evidence("", UNTESTED, UNTESTED, NOTHING, f"Not tested: {missing}"),
    )
    value = chosen.interval
    needed = [n for test in tests if (n := test.seeds_needed) is not None]
    contradicted = len(needed) == 2 and (needed[0] == needed[1] or all(test.shown for test in tests))
    seeds = max(min(needed), value.n + 1) if needed and not contradicted else None
    asked = f"a GPU with the full preset: {missing}" if toys else missing + _how_many(seeds, value.n)
    scope = "Measured with a tiny preset or on a processor, which decides nothing about GPUs. " if toys else ""
    return Finding(
        id,
        claim,
        verdict,
        scope + (_split(verdict, evidence) or (f"{chosen.place}: " if chosen.place else "") + chosen.sentence),
        value.value if value.n else None,
        value.low if value.known else None,
        value.high if value.known else None,
        unit if value.n else None,
        value.n,
        tuple(dict.fromkeys(i for e in evidence for i in e.run_ids)),
        asked if verdict == NOT_DECIDED else "",
        plot,
        (*(f"{e.place}: {e.verdict if not toys else NOT_DECIDED}. {e.sentence}" for e in evidence), *notes),
        seeds if verdict == NOT_DECIDED else None,
    )


def _how_many(seeds: int | None, n: int) -> str:
    """How many seeds would decide, as the end of a sentence; nothing where there are none yet."""
    if seeds is not None:
        return f"; were all as measured, about {count(seeds, 'seed')} would decide"
    if not n:
        return ""
    return (
        f"; at least {FEWEST_SEEDS} seeds" if n < FEWEST_SEEDS else "; were all as measured, more seeds alone would not decide"
    )


def _split(verdict: str, evidence: Sequence[Evidence]) -> str | None:
    """A sentence for places that contradict one another; None where they do not."""
    places = {kind: ", ".join(e.place for e in evidence if e.verdict == kind) for kind in (SUPPORTED, REFUTED)}
    if verdict != NOT_DECIDED or not all(places.values()):
        return None
    return f"The evidence is split: supported for {places[SUPPORTED]}; refuted for {places[REFUTED]}."


def seen(hits: int, n: int, what: str) -> str:
    """``what`` with how many seeds; of none, that it was not seen, which is not that it does not happen."""
    return f"{what} with {hits} of {count(n, 'seed')}" if hits else f"not seen in {count(n, 'seed')}: {what}"


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
    def cells(self) -> dict[tuple[str, str], Cell]:
        """Every cell of the folder's main variants by case and configuration."""
        return all_cells(self.folder)

    def about_toys(self, run_ids: Iterable[str]) -> bool:
        """Whether some of these runs had the tiny preset or ran on a processor."""
        return any(run.preset == "tiny" or is_cpu(run) for run_id in run_ids if (run := self.folder.by_id.get(run_id)))

    def unlike(self, *cells: BySeed, but: Sequence[str] = ()) -> str | None:
        """Why cells of several cases must not be joined in a claim, or None."""
        return unlike_reason([run for cell in cells for run in cell.values()], but)

    def healthy(self, *cases: str) -> str | None:
        """Which of these cases has no healthy fp32_true that completed, as a phrase; None when all have."""
        ill = [case for case in cases if (cell := self.cells.get((case, REFERENCE))) is None or cell.state != COMPLETED]
        return f"no healthy fp32_true of {joined(ill)}" if ill else None

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
