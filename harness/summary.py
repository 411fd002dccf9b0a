"""A run's row from what happened."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from harness.parallel.team import RankFailed
from harness.settings import RunSettings
from instrument.environment import capture, device_slug
from instrument.records import EvaluationRecord, RunRecord, StepRecord
from instrument.step_meter import Divergence


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
    resumed_behind: list[int] = field(default_factory=list)
    began_s: float = field(default_factory=time.perf_counter)

    def add_time(self, name: str, seconds: float) -> None:
        """Count ``seconds`` more for a part of the run."""
        self.timings_s[name] = self.timings_s.get(name, 0.0) + seconds

    def failed(self, other: RankFailed) -> Outcome:
        """End as another rank of the run did; itself."""
        self.status, self.error = other.status, str(other)
        self.flags["failed_rank"] = other.rank
        if other.traceback:
            self.flags["traceback"] = other.traceback
        return self

    def timings_now_s(self) -> dict[str, float]:
        """The time spent so far, by part and in ``total``; of all processes that had a part in the run."""
        return self.timings_s | {"total": self.timings_s.get("total", 0.0) + time.perf_counter() - self.began_s}

    def warm_steps(self, untimed_steps: int) -> list[StepRecord]:
        """The steps, those without their time that come as soon behind a continuation as the untimed ones come
        behind the beginning: a process' first steps are slow."""
        cold = {step for behind in self.resumed_behind for step in range(behind + 1, behind + 1 + untimed_steps)}
        return [msgspec.structs.replace(s, step_time_s=None) if s.step in cold else s for s in self.steps]


def summarize(settings: RunSettings, outcome: Outcome) -> RunRecord:
    """The run's row from what happened."""
    device = torch.device(settings.device)
    finite = [s.loss for s in outcome.steps if s.loss is not None and np.isfinite(s.loss)]
    last = outcome.evaluations[-1] if outcome.status == "completed" else None
    divergence = outcome.divergence
    return RunRecord(
        run_id=settings.run_id, case=settings.case.id, scenario=settings.case.scenario,
        arch=settings.case.architecture.id, task=settings.case.task.id, loss=settings.case.task.loss,
        loss_reduction=settings.case.loss_reduction, dtype_config=settings.config.id, seed=settings.seed,
        preset=settings.preset, device=device_slug(device), data_source=settings.data,
        weights_source=settings.weights, status=outcome.status,
        divergence_step=divergence.step if divergence else None,
        first_nonfinite=divergence.first_nonfinite if divergence else None,
        steps_done=len(outcome.steps), max_steps=settings.max_steps, batch_size=settings.batch_size,
        micro_batch=settings.micro_batch, seq_len=settings.seq_len,
        loss_initial=outcome.steps[0].loss if outcome.steps else None,
        train_loss_final=statistics.fmean(finite[-max(1, len(outcome.steps) // 10):]) if finite else None,
        val_loss=last and last.val_loss, perplexity=last and last.perplexity, f1_micro=last and last.f1_micro,
        f1_macro=last and last.f1_macro, f1_micro_tuned=last and last.f1_micro_tuned,
        **throughput(outcome.warm_steps(settings.untimed_steps)[settings.untimed_steps:]),
        scaler_skips=sum(s.step_skipped for s in outcome.steps), instrument=settings.instrument,
        env=capture(device), config=settings.as_config(),
        flags={**outcome.flags, "timings_s": {k: round(v, 4) for k, v in outcome.timings_s.items()}},
        error=outcome.error or (divergence.reason if divergence else None),
        **({"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | outcome.facts))


def throughput(steps: list[StepRecord]) -> dict[str, float | int | None]:
    """Rates over the timed steps: total over total, never a mean of ratios."""
    steps = [s for s in steps if s.step_time_s is not None]
    times = [s.step_time_s for s in steps]
    if not times:
        return {"timed_steps": 0}
    total_s = sum(times)
    p50, p95 = np.percentile(times, (50, 95))
    return {"timed_steps": len(times), "samples_per_s": sum(s.samples for s in steps) / total_s,
            "tokens_per_s": sum(s.tokens for s in steps) / total_s,
            "real_tokens_per_s": sum(s.real_tokens for s in steps) / total_s,
            "step_time_p50_s": float(p50), "step_time_p95_s": float(p95)}
