"""One state per cell (case x configuration), computed once: what every figure, title, verdict and table says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from kernels.float_formats import FP16
from report.significance import LARGEST, UNTESTED, Test, above, all_of, any_of, below, rate_above
from report.statistics import NOTHING, Interval, exponential, mean_interval, share_interval
from report.tables.judgement import (
    MARGIN_F1,
    MARGIN_LOSS,
    MARGIN_NATS,
    MARGIN_SPEED,
    Judged,
    Judgements,
    divergence_text,
    finite,
    judge_runs,
)
from report.tables.selection import REFERENCE, column_of, incomparable_reason, is_lm, series_order
from report.tables.speed import ineligible_reason, pooled_rate

MEMORY = {"allocated": "peak_allocated_bytes", "rss": "peak_rss_bytes"}
COMPLETED, FAILING, STALLED, UNFINISHED = "completed", "failed", "stalled", "unfinished"
UNHEALTHY, INCOMPARABLE, UNMEASURED = "unhealthy reference", "incomparable", "not measured"
STATES = (COMPLETED, FAILING, STALLED, UNFINISHED, UNHEALTHY, INCOMPARABLE, UNMEASURED)
RECOMMENDED, RUNNER_UP, USABLE, AVOID = "recommended", "runner-up", "usable", "avoid"
LOST, UNRESOLVED, UNJUDGED, CONTROL, MEASURE, NO_VERDICT = (
    "failed",
    "not resolved",
    "not judged",
    "control",
    "reference",
    "-",
)
VERDICTS = (RECOMMENDED, RUNNER_UP, USABLE, AVOID, LOST, UNRESOLVED, UNJUDGED, CONTROL, MEASURE, NO_VERDICT)


@dataclass(frozen=True)
class Quality:
    """One measure of a cell beside fp32_true of the same seeds.

    ``name``: ``perplexity``, ``loss``, ``micro-F1``, ``macro-F1``, with ``training`` before it where no validation was
    measured. ``value``: mean over the cell's seeds (perplexity: exp of the mean loss). ``baseline``: what the most frequent
    answer scores, where known. ``difference``: mean and 95 % t-interval of cell minus reference over paired seeds, in ``unit``
    (``nats``, ``share`` of the reference's loss, ``F1``). ``worse``: seed -> how much worse than the reference, above 0 is
    worse, to compare with ``margin``. ``judged``: False where the measure cannot judge, and ``note`` says why."""

    name: str
    unit: str
    value: float
    baseline: float | None
    difference: Interval
    worse: dict[int, float]
    margin: float
    resolution: float = 0.0
    judged: bool = True
    note: str = ""

    def worse_than_margin(self) -> Test:
        """The cell is worse than the reference by more than the margin."""
        return above(self.worse.values(), self.margin, self.resolution)

    def within_margin(self) -> Test:
        """The cell is worse than the reference by less than the margin, if at all."""
        return below(self.worse.values(), self.margin, self.resolution)

    def any_worse(self) -> Test:
        """The cell is worse than the reference, by however little."""
        return above(self.worse.values(), 0.0, self.resolution)


@dataclass(frozen=True)
class Cell:
    """A case and a configuration. ``state`` is one of `STATES`, and ``what`` says what failed, why it cannot be compared or
    why nothing was measured. ``n``: seeds that ended, without copies and without those in which fp32_true failed alike;
    ``n_failed`` of them failed. ``speed``: samples/s over fp32_true's, geometric mean over paired seeds with its 95 %
    t-interval; ``log_speed`` by seed. ``peak_bytes``: the largest of the seeds by ``peak_kind`` (``allocated`` on the GPU,
    ``rss``); where ``peak_is_bound``, the smallest of them, which other runs of the process may have raised.
    ``largest_logit``: finite, over steps and seeds; nan when not logged."""

    case: str
    column: str
    arch: str
    dtype_config: str
    state: str
    what: str
    n: int = 0
    n_failed: int = 0
    speed: Interval = NOTHING
    log_speed: dict[int, float] = field(default_factory=dict)
    samples_per_s: float = math.nan
    peak_bytes: int | None = None
    peak_kind: str | None = None
    peak_is_bound: bool = False
    qualities: tuple[Quality, ...] = ()
    largest_logit: float = math.nan
    verdict: str = NO_VERDICT
    why: str = ""
    run_ids: tuple[str, ...] = ()

    @property
    def headroom_bits(self) -> float:
        """Doublings from the largest logit to 65,504; negative beyond it; nan when no logit was logged."""
        return math.log2(FP16.max / self.largest_logit) if self.largest_logit > 0 else math.nan

    @property
    def failure_share(self) -> Interval:
        """The share of seeds that failed with its exact interval."""
        return share_interval(self.n_failed, self.n)

    @property
    def judged_qualities(self) -> tuple[Quality, ...]:
        """The measures that can judge."""
        return tuple(quality for quality in self.qualities if quality.judged)

    def bad(self) -> Test:
        """It fails more often than rarely, trains worse than the margin allows, or is slower than fp32_true."""
        return any_of(
            [rate_above(self.n_failed, self.n), *(q.worse_than_margin() for q in self.judged_qualities), self.slower()]
        )

    def holds(self) -> Test:
        """No failure was seen, and no measure of quality is worse than its margin."""
        if self.state != COMPLETED:
            return UNTESTED
        return all_of(quality.within_margin() for quality in self.judged_qualities)

    @property
    def poor(self) -> bool:
        """Avoided, and for its quality: shown to train worse than fp32_true by more than a margin."""
        return (
            self.verdict == AVOID
            and self.state == COMPLETED
            and any(q.worse_than_margin().shown for q in self.judged_qualities)
        )

    def slower(self) -> Test:
        """It is slower than fp32_true by more than 2 %."""
        return below(self.log_speed.values(), -MARGIN_SPEED)


def measure_cells(folder: Folder, judgements: Judgements | None = None) -> dict[tuple[str, str], Cell]:
    """Every cell of the folder's main variants that was run, without a verdict, by case and configuration."""
    judgements = judgements or judge_runs(folder)
    runs = judgements.selection.runs
    configs = series_order({run.dtype_config for run in runs})
    eligible = {run.run_id for run in runs if ineligible_reason(folder, run) is None}
    kinds = {
        case: memory_kind([run for run in runs if run.case == case and run.status == "completed"])
        for case in {run.case for run in runs}
    }
    found = {}
    for case in kinds:
        for config in configs:
            if judged := judgements.of(case, config):
                found[case, config] = _cell(folder, judgements, judged, kinds[case], eligible)
    return found


def _cell(folder: Folder, judgements: Judgements, judged: list[Judged], kind: str | None, eligible: set[str]) -> Cell:
    first = judged[0].run
    every = [j for j in judged if j.state not in ("unfinished", "unsupported")]
    ended = [j for j in every if not _is_an_accident(judgements, j)] or every
    failed = [j for j in ended if j.state in ("diverged", "failed", "stalled") and not _is_an_accident(judgements, j)]
    state, what = _state(judgements, judged, ended, failed)
    completed = [j.run for j in ended if j.run.status == "completed"]
    pairs = [
        (run, reference)
        for run in completed
        if (reference := judgements.selection.reference(run)) is not None
        and reference.status == "completed"
        and incomparable_reason(run, reference) is None
    ]
    timed = [(a, b) for a, b in pairs if a.run_id in eligible and b.run_id in eligible]
    log_speed = {run.seed: math.log(run.samples_per_s / reference.samples_per_s) for run, reference in timed}
    rates = [run.samples_per_s for run in completed if run.run_id in eligible]
    bound = any(shares_process(run) for run in completed)
    return Cell(
        first.case,
        column_of(first) or "",
        first.arch,
        first.dtype_config,
        state,
        what,
        len(ended),
        len(failed),
        exponential(mean_interval([*log_speed.values()])) if log_speed else NOTHING,
        log_speed,
        pooled_rate(rates) if rates else math.nan,
        peak_of(completed, kind) if kind and completed else None,
        kind if completed else None,
        bound,
        qualities(folder, completed, pairs),
        _largest_logit(folder, [j.run for j in ended]),
        run_ids=tuple(j.run.run_id for j in judged),
    )


def _state(judgements: Judgements, judged: list[Judged], ended: list[Judged], failed: list[Judged]) -> tuple[str, str]:
    first = judged[0].run
    if not ended:
        unsupported = [j for j in judged if j.state == "unsupported"]
        return (UNMEASURED, f"unsupported: {unsupported[0].reason}") if unsupported else (UNFINISHED, judged[0].reason)
    if failed:
        state = STALLED if all(j.state == "stalled" for j in failed) else FAILING
        return state, failure_text(failed)
    if first.case in judgements.unhealthy:
        return UNHEALTHY, judgements.unhealthy[first.case]
    accident = next((j for j in ended if j.state == "failed"), None)
    if accident is not None:
        return UNMEASURED, f"{accident.run.status}, as fp32_true"
    unjudged = [j for j in ended if j.state == "unjudged"]
    return (INCOMPARABLE, unjudged[0].reason) if len(unjudged) == len(ended) else (COMPLETED, "")


def failure_text(failed: list[Judged]) -> str:
    """What failed first and in which phase: ``NaN @ 50, optimizer``; ``oom``; ``stalled``."""
    diverged = [j.run for j in failed if j.state == "diverged"]
    if diverged:
        run = min(diverged, key=lambda run: run.divergence_step)
        phase = f", {run.first_nonfinite.phase}" if run.first_nonfinite else ""
        return divergence_text(run) + phase
    return ", ".join(dict.fromkeys(j.reason if j.run.status == "completed" else j.run.status for j in failed))


def _is_an_accident(judgements: Judgements, failed: Judged) -> bool:
    """Nothing that the configuration did: the reference of its seed ended alike, or, where none completed, any of its case."""
    others = judgements.of(failed.run.case, REFERENCE)
    if any(j.run.status == "completed" for j in others):
        others = [j for j in others if j.run.seed == failed.run.seed]
    return (
        failed.state == "failed"
        and failed.run.dtype_config != REFERENCE
        and any(j.state == "failed" and j.run.status == failed.run.status for j in others)
    )


def qualities(folder: Folder, runs: list[RunRecord], pairs: list[tuple[RunRecord, RunRecord]]) -> tuple[Quality, ...]:
    """The measures of a cell: perplexity of a language model; micro-F1, macro-F1 and loss of a classifier."""
    if not runs:
        return ()
    loss = _loss(runs, pairs)
    if is_lm(runs[0]):
        return (loss,) if loss else ()
    scores = [_f1(folder, runs, pairs, "f1_micro", "micro-F1"), _f1(folder, runs, pairs, "f1_macro", "macro-F1")]
    return tuple(quality for quality in (*scores, loss) if quality is not None)


def _loss(runs: list[RunRecord], pairs: list[tuple[RunRecord, RunRecord]]) -> Quality | None:
    """The validation loss where some pair has one (else some run), else the last tenth of the training loss. A seed without
    it is not replaced by its training loss: that would hide what the others show."""
    for name in ("val_loss", "train_loss_final"):
        values = {run.run_id: value for run in runs if finite(value := getattr(run, name))}
        both = [(a, b) for a, b in pairs if a.run_id in values and finite(getattr(b, name))]
        if both or (values and not pairs):
            break
    else:
        if not any(finite(b.val_loss) or finite(b.train_loss_final) for _, b in pairs):
            return None
        name, values, both = "val_loss", {}, []
    before = "training " if name == "train_loss_final" else ""
    lm, mean = is_lm(runs[0]), float(np.mean([*values.values()])) if values else math.nan
    worse = {
        run.seed: values[run.run_id] - base if lm else values[run.run_id] / base - 1
        for run, reference in both
        if (base := getattr(reference, name)) or lm
    }
    difference = _interval(worse.values())
    if lm:
        return Quality(before + "perplexity", "nats", _exp(mean), None, difference, worse, MARGIN_NATS)
    return Quality(before + "loss", "share", mean, None, difference, worse, MARGIN_LOSS)


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def _f1(folder: Folder, runs: list[RunRecord], pairs: list, field: str, name: str) -> Quality | None:
    known = [run for run in runs if _is_number(getattr(run, field))]
    measured = [(a, b) for a, b in pairs if _is_number(getattr(b, field))]
    if not known and not measured:
        return None
    both = [(a, b) for a, b in measured if _is_number(getattr(a, field))]
    worse = {run.seed: getattr(reference, field) - getattr(run, field) for run, reference in both}
    baseline = next((f1 for run in known if (f1 := getattr(run, f"{field}_majority")) is not None), None)
    value = float(np.mean([getattr(run, field) for run in known])) if known else math.nan
    reference = float(np.mean([getattr(reference, field) for _, reference in measured])) if measured else math.nan
    learnt = reference > (baseline or 0.0) + 2 * MARGIN_F1
    note = "" if learnt or not measured else f"fp32_true scores {reference:.2f}, no more than the most frequent answer"
    return Quality(
        name,
        "F1",
        value,
        baseline,
        _interval(worse.values()).negated(),
        worse,
        MARGIN_F1,
        _rounding(folder, known),
        learnt,
        note,
    )


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _rounding(folder: Folder, runs: list[RunRecord]) -> float:
    """The standard deviation that F1 has from counting whole documents."""
    samples = [evaluation.samples for run in runs for evaluation in folder.evaluations(run.run_id)[-1:] if evaluation.step]
    return 1 / (math.sqrt(12) * min(samples)) if samples else 0.0


def _interval(values: Iterable[float]) -> Interval:
    known = [value for value in values if abs(value) < LARGEST]
    return mean_interval(known) if known else NOTHING


def _largest_logit(folder: Folder, runs: list[RunRecord]) -> float:
    largest = math.nan
    for run in runs:
        absmax = folder.steps(run.run_id)["logit_absmax"]
        finite = absmax[np.isfinite(absmax)]
        if finite.size:
            largest = max(float(finite.max()), 0.0 if math.isnan(largest) else largest)
    return largest


def memory_kind(runs: list[RunRecord]) -> str | None:
    """The one measure of memory that every run has: the allocator's on a GPU, else resident memory."""
    return next((kind for kind, field in MEMORY.items() if runs and all(getattr(r, field) is not None for r in runs)), None)


def peak_of(runs: list[RunRecord], memory: str) -> int:
    """What a configuration needs: the largest peak of its seeds. Where runs shared a process, a later
    run's peak holds what earlier ones left, so the smallest is the nearest to the truth."""
    peaks = [getattr(run, MEMORY[memory]) for run in runs]
    return min(peaks) if any(shares_process(run) for run in runs) else max(peaks)


def shares_process(run: RunRecord) -> bool:
    """Whether the run's process had runs before it, whose memory its peak still holds."""
    return bool((run.flags.get("imported") or {}).get("memory_shares_process"))
