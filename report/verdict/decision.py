"""Per task: the fastest configuration whose quality holds, what it costs, and the configurations to avoid.

A configuration is recommended only when it completed every case and seed of the task that a healthy
fp32_true completed, with a quality that is not poor. Controls are never recommended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.hypotheses import judge
from report.hypotheses.evidence import NOT_DECIDED, EvidenceBase
from report.statistics import FEWEST_SEEDS, Interval, exponential, mean_interval
from report.tables.b_efficiency import memory_kind, peak_of
from report.tables.judgement import gap_text, is_unfinished
from report.tables.selection import REFERENCE, TASK_COLUMNS, column_of, is_control, series_order
from report.tables.speed import group_scores, pooled_rate
from report.text import shortened, signed
from report.verdict.advice import next_command, to_avoid


@dataclass(frozen=True)
class Price:
    """``per_hour`` of the whole machine, above 0, in ``currency`` (a word such as ``EUR``, or empty)."""

    per_hour: float
    currency: str = ""

    def of(self, hours: float) -> str:
        """The price of so many hours: ``1.85 EUR``."""
        return f"{plain_number(self.per_hour * hours)} {self.currency}".rstrip()


def cost_text(
    relative_cost: float, hours_per_million_samples: float, hours_per_billion_real_tokens: float | None, price: Price | None
) -> str:
    """Cost against fp32_true's, and per million samples and 10^9 real tokens: in money where a price is known,
    else in hours."""
    relative = f"{relative_cost:.2f} of fp32_true's"
    say = price.of if price else lambda hours: f"{plain_number(hours)} hours"
    tokens = f", {say(hours_per_billion_real_tokens)} per 10⁹ real tokens" if hours_per_billion_real_tokens else ""
    return f"{relative}, {say(hours_per_million_samples)} per million samples{tokens}"


def plain_number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"


@dataclass(frozen=True)
class TaskVerdict:
    """One task. ``use`` None: nothing can be recommended, and ``reason`` says why. ``relative_speed`` with ``low`` and ``high``
    is against fp32_true, ``relative_cost`` its inverse (the same machine by the hour); ``cost`` is the same as text, in money
    where the price of an hour is known. ``quality`` is text. ``confidence``: ``high`` (3 seeds or more, ahead of every rival),
    ``medium`` (3 seeds or more, tied, or a rival is unfinished), ``low``."""

    column: str
    use: str | None
    avoid: tuple[str, ...]
    relative_speed: float | None = None
    low: float | None = None
    high: float | None = None
    peak_bytes: int | None = None
    peak_kind: str | None = None
    quality: str | None = None
    reason: str = ""
    confidence: str | None = None
    n: int = 0
    relative_cost: float | None = None
    hours_per_million_samples: float | None = None
    hours_per_billion_real_tokens: float | None = None
    cost: str | None = None
    cases: tuple[str, ...] = ()
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The decision for one device. ``tasks`` in the order of the task columns, those that were run."""

    device: str
    marks: tuple[str, ...]
    n_runs: int
    n_seeds: int
    n_defects: int
    tasks: tuple[TaskVerdict, ...]
    claims: tuple[tuple[str, str], ...]
    open_questions: tuple[str, ...]
    next_command: str
    price_per_hour: float | None = None
    currency: str = ""


def verdict(folder: Folder, price: Price | None = None) -> Verdict:
    """The decision, computed from the rows alone; ``price`` turns hours into money."""
    base = EvidenceBase.of(folder)
    findings = judge(folder)
    good = [run for run in base.selection.runs if base.state(run) == "completed" and base.is_timed(run)]
    scores = group_scores(good, column_of)
    columns = [column for column in TASK_COLUMNS if any(column_of(run) == column for run in base.selection.runs)]
    return Verdict(
        folder.device,
        folder.marks,
        len(folder.runs),
        len({run.seed for run in folder.runs}),
        len(folder.defects),
        tuple(_task(base, column, scores.get(column, {}), good, price) for column in columns),
        tuple((f.id, f.verdict) for f in findings),
        tuple(f"{f.id}: {f.claim} Not decided; it needs {f.would_decide}." for f in findings if f.verdict == NOT_DECIDED),
        next_command(folder, base),
        price.per_hour if price else None,
        price.currency if price else "",
    )


def _task(
    base: EvidenceBase, column: str, scores: dict[str, list[float]], good: list[RunRecord], price: Price | None
) -> TaskVerdict:
    cases = tuple(case for case, run in base.cases.items() if column_of(run) == column)
    avoid = to_avoid(base, cases)
    healthy = [case for case in cases if case not in base.judgements.unhealthy]
    if not scores:
        return TaskVerdict(column, None, avoid, reason=_why_nothing(base, cases, healthy), cases=cases)
    best = max(scores, key=lambda config: float(np.mean(scores[config])))
    speed = exponential(mean_interval(scores[best]))
    runs = [run for run in good if run.dtype_config == best and run.case in healthy]
    memory = memory_kind(runs)
    hours = 1e6 / pooled_rate([run.samples_per_s for run in runs]) / 3600
    token_hours = _token_hours(runs)
    confidence, ties = _confidence(base, scores, best)
    left_out = [case for case in cases if case not in healthy]
    waiting = series_order(
        run.dtype_config
        for run in base.selection.runs
        if run.case in healthy and is_unfinished(run) and run.dtype_config not in scores and not is_control(run.dtype_config)
    )
    confidence = "medium" if waiting and confidence == "high" else confidence
    reasons = {
        "no other configuration completed every run": len(scores) == 1,
        f"tied with {shortened(ties)}": ties,
        f"{shortened(waiting)} unfinished, so not judged": waiting,
        f"{shortened(left_out)} left out: reference unhealthy": left_out,
    }
    return TaskVerdict(
        column,
        best,
        avoid,
        speed.value,
        *(_or_none(v) for v in (speed.low, speed.high)),
        peak_of(runs, memory) if memory else None,
        memory,
        quality_text(base, runs, best),
        "; ".join(reason for reason, holds in reasons.items() if holds),
        confidence,
        speed.n,
        1 / speed.value,
        hours,
        token_hours,
        cost_text(1 / speed.value, hours, token_hours, price),
        cases,
        tuple(run.run_id for run in runs),
    )


def _token_hours(runs: list[RunRecord]) -> float | None:
    """Hours for 10^9 tokens without padding; None unless every run counted them."""
    rates = [run.real_tokens_per_s for run in runs]
    return 1e9 / pooled_rate(rates) / 3600 if rates and all(rates) else None


def _why_nothing(base: EvidenceBase, cases: tuple[str, ...], healthy: list[str]) -> str:
    if not healthy:
        case = cases[0]
        return f"the fp32_true reference of {case} is unhealthy: {base.judgements.unhealthy[case]}"
    return "no fp32_true run to judge by that completed undisturbed, with enough timed steps"


def _confidence(base: EvidenceBase, scores: dict[str, list[float]], best: str) -> tuple[str, list[str]]:
    """How sure, and which rivals the seeds do not separate from the best."""
    n = len(scores[best])
    if n < FEWEST_SEEDS:
        return "low", []
    ties = [
        rival
        for rival in series_order(scores)
        if rival != best and not mean_interval(np.subtract(scores[best], scores[rival])).above(0.0)
    ]
    if "TINY PRESET" in base.folder.marks:
        return "low", ties
    return ("medium" if ties else "high"), ties


def quality_text(base: EvidenceBase, runs: list[RunRecord], config: str) -> str | None:
    """The largest mean distance from fp32_true over the task's cases, with its interval."""
    if config == REFERENCE or is_control(config):
        return "the reference"
    found: list[tuple[float, str]] = []
    for case in {run.case for run in runs}:
        judged = [base.judgements.by_id[run.run_id] for run in runs if run.case == case]
        gaps = mean_interval([j.gap for j in judged if j.gap is not None])
        if gaps.n:
            found.append((gaps.value, f"loss {gap_text(gaps.value, judged[0].unit)}{_spread(gaps, judged[0].unit)}"))
        f1 = mean_interval([j.f1_gap for j in judged if j.f1_gap is not None])
        if f1.n and found:
            found[-1] = (found[-1][0], f"{found[-1][1]}, F1 {signed(100 * f1.value, 1)} pt")
    return max(found)[1] if found else None


def _spread(gaps: Interval, unit: str) -> str:
    if not gaps.known:
        return ""
    scale = 1 if unit == "nats" else 100
    return f" [{signed(scale * gaps.low, 2)}, {signed(scale * gaps.high, 2)}]"


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
