"""What a run has reached, from its step records: how far, its loss, its speed. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from instrument.records import StepRecord


def reached(steps: Sequence[StepRecord], untimed_steps: int, resumed_behind: Sequence[int]) -> dict[str, Any]:
    """Fields of a run's row."""
    finite = [s.loss for s in steps if s.loss is not None and math.isfinite(s.loss)]
    return {
        "steps_done": len(steps),
        "loss_initial": steps[0].loss if steps else None,
        "train_loss_final": statistics.fmean(finite[-max(1, len(steps) // 10) :]) if finite else None,
        "scaler_skips": sum(s.step_skipped for s in steps),
        **throughput(warm_steps(steps, untimed_steps, resumed_behind)[untimed_steps:]),
    }


def warm_steps(steps: Sequence[StepRecord], untimed_steps: int, resumed_behind: Sequence[int]) -> list[StepRecord]:
    """The steps, those without their time that come as soon behind a continuation as the untimed ones come behind the
    beginning: a process' first steps are slow."""
    cold = {step for behind in resumed_behind for step in range(behind + 1, behind + 1 + untimed_steps)}
    return [msgspec.structs.replace(s, step_time_s=None) if s.step in cold else s for s in steps]


def throughput(steps: Sequence[StepRecord]) -> dict[str, float | int | None]:
    """Rates over the timed steps: total over total, never a mean of ratios."""
    steps = [s for s in steps if s.step_time_s is not None]
    times = [s.step_time_s for s in steps]
    if not times:
        return {"timed_steps": 0}
    total_s = sum(times)
    p50, p95 = np.percentile(times, (50, 95))
    return {
        "timed_steps": len(times),
        "samples_per_s": sum(s.samples for s in steps) / total_s,
        "tokens_per_s": sum(s.tokens for s in steps) / total_s,
        "real_tokens_per_s": sum(s.real_tokens for s in steps) / total_s,
        "step_time_p50_s": float(p50),
        "step_time_p95_s": float(p95),
    }
