"""What a run has reached, from its files and records: steps, loss, speed, checkpoints, disturbances. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from instrument.results.schemas import RunRecord, StepRecord

CHECKPOINT_PREFIX = "checkpoint-"


def checkpoint_steps(run_folder: Path) -> list[int]:
    """The steps of the checkpoints that are there, newest first, whole or not."""
    names = (path.name.removeprefix(CHECKPOINT_PREFIX) for path in run_folder.glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def progress_summary(steps: Sequence[StepRecord], untimed_steps: int, resumed_after: Sequence[int]) -> dict[str, Any]:
    """Fields of a run's row. Rates are over the timed steps, total over total, never a mean of ratios."""
    finite = [s.loss for s in steps if s.loss is not None and math.isfinite(s.loss)]
    timed = [s for s in warm_steps(steps, untimed_steps, resumed_after)[untimed_steps:] if s.step_time_s is not None]
    facts: dict[str, Any] = {
        "steps_done": len(steps),
        "loss_initial": steps[0].loss if steps else None,
        "train_loss_final": statistics.fmean(finite[-max(1, len(steps) // 10) :]) if finite else None,
        "scaler_skips": sum(s.step_skipped for s in steps),
        "timed_steps": len(timed),
    }
    if timed:
        times = [s.step_time_s for s in timed]
        for name in ("samples", "tokens", "real_tokens"):
            facts[f"{name}_per_s"] = sum(getattr(s, name) for s in timed) / sum(times)
        facts["step_time_p50_s"], facts["step_time_p95_s"] = (float(p) for p in np.percentile(times, (50, 95)))
    return facts


def warm_steps(steps: Sequence[StepRecord], untimed_steps: int, resumed_after: Sequence[int]) -> list[StepRecord]:
    """Drops the timings of the ``untimed_steps`` warm-up steps after every resume: a process' first steps are slow."""
    cold = {step for after in resumed_after for step in range(after + 1, after + 1 + untimed_steps)}
    return [msgspec.structs.replace(s, step_time_s=None) if s.step in cold else s for s in steps]


def disturbance(record: RunRecord) -> str | None:
    """What ``flags["hardware"]`` says of heat and of other processes; None where there was nothing, or nobody knows."""
    hardware = record.flags.get("hardware")
    if not isinstance(hardware, dict):
        return None
    found = []
    if hardware.get("throttled"):
        found.append(f"the GPU slowed itself down ({', '.join(hardware.get('throttle_reasons') or [])})")
    if hardware.get("contended"):
        found.append("another process was on the GPU")
    return f"{'; '.join(found)}: the report leaves this run out of the figures of speed" if found else None
