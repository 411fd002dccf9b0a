"""A run's row from what happened."""

from __future__ import annotations

import resource
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from harness.failure import after_divergence
from harness.parallel.context import RankFailed
from harness.run.progress import progress_summary, warm_steps
from harness.settings import RunSettings
from instrument.environment import capture, device_slug
from instrument.results.schemas import EvaluationRecord, RunRecord, StepRecord
from instrument.results.signature import signature_of
from instrument.watch.meter import Divergence

SCORES = ("val_loss", "perplexity", "f1_micro", "f1_macro", "f1_micro_tuned")
MAJORITY_SCORES = ("f1_micro_majority", "f1_macro_majority")
"""Of the constant answer: the same in every evaluation, and known of a failed run too."""


@dataclass
class Outcome:
    """What a run has produced so far; a crash keeps what was reached."""

    status: str = "error"
    error: str | None = None
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    divergence: Divergence | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    resumed_after: list[int] = field(default_factory=list)
    began_s: float = field(default_factory=time.perf_counter)
    machine: tuple[str, dict[str, Any]] | None = None
    """The device's slug and the environment, captured before anything can go wrong: a poisoned CUDA context names neither."""

    def add_time(self, name: str, seconds: float) -> None:
        """Count ``seconds`` more for a part of the run."""
        self.timings_s[name] = self.timings_s.get(name, 0.0) + seconds

    def diverged(self, divergence: Divergence) -> None:
        """The run has diverged: nothing that fails later changes its status."""
        self.status, self.divergence = "diverged", divergence

    def fail(self, status: str, error: str, flags: dict[str, Any]) -> Outcome:
        """End with a failure; returns itself. After a divergence that is a reason why less is known of it."""
        if self.divergence is None:
            self.status, self.error = status, error
            self.flags |= flags
        else:
            self.flags = after_divergence(self.flags, error, flags)
        return self

    def failed_with(self, other: RankFailed) -> Outcome:
        """End as another rank of the run did; returns itself."""
        traceback = {"traceback": other.traceback} if other.traceback else {}
        return self.fail(other.status, str(other), other.flags | {"failed_rank": other.rank} | traceback)

    def timings_now_s(self) -> dict[str, float]:
        """The time spent so far, by part and in ``total``; of all processes that had a part in the run."""
        return self.timings_s | {"total": self.timings_s.get("total", 0.0) + time.perf_counter() - self.began_s}

    def warm_steps(self, untimed_steps: int) -> list[StepRecord]:
        """The steps, without the timings of warm-up steps after a resume."""
        return warm_steps(self.steps, untimed_steps, self.resumed_after)


def summarize(settings: RunSettings, outcome: Outcome) -> RunRecord:
    """The run's row from what happened."""
    slug, environment = outcome.machine or machine_of(settings)
    last = outcome.evaluations[-1] if outcome.status == "completed" else None
    first = outcome.evaluations[0] if outcome.evaluations else None
    divergence = outcome.divergence
    record = RunRecord(
        run_id=settings.run_id,
        case=settings.case.id,
        scenario=settings.case.scenario,
        arch=settings.case.architecture.id,
        task=settings.case.task.id,
        loss=settings.case.task.loss,
        loss_reduction=settings.case.loss_reduction,
        dtype_config=settings.config.id,
        seed=settings.seed,
        preset=settings.preset,
        device=slug,
        data_source=settings.data,
        weights_source=settings.weights,
        status=outcome.status,
        divergence_step=divergence.step if divergence else None,
        first_nonfinite=divergence.first_nonfinite if divergence else None,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        seq_len=settings.seq_len,
        **{name: last and getattr(last, name) for name in SCORES},
        **{name: first and getattr(first, name) for name in MAJORITY_SCORES},
        **progress_summary(outcome.steps, settings.untimed_steps, outcome.resumed_after),
        instrument=settings.instrument,
        env=environment,
        config=settings.as_config(),
        flags={
            **({"case_spelled": list(settings.case.spelled)} if settings.case.spelled else {}),
            "unhashed": settings.unhashed(),
            **outcome.flags,
            "timings_s": {k: round(v, 4) for k, v in outcome.timings_s.items()},
        },
        error=outcome.error or (divergence.reason if divergence else None),
        **({"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | outcome.facts),
    )
    return msgspec.structs.replace(record, flags=record.flags | {"signature": signature_of(record)})


def idle_since(steps: Sequence[StepRecord], emptied: Container[int]) -> int | None:
    """The step after which nothing but zeros entered an update: skipped, all gradients 0, or ``emptied`` by a clip norm that
    overflowed; None where the last step was none of these."""
    idle = 0
    for record in reversed(steps):
        if not (record.step_skipped or record.grad_absmax == 0 or record.step in emptied):
            break
        idle += 1
    return steps[-1].step - idle if idle else None


def machine_of(settings: RunSettings) -> tuple[str, dict[str, Any]]:
    """The device's slug and the environment of a run here."""
    device = torch.device(settings.device)
    return device_slug(device), capture(device)
