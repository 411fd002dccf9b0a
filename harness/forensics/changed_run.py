"""Steps of a failed run again from its stored state, with one change in its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from harness.forensics.changes import Change
from harness.forensics.footprint import footprint_bytes
from harness.forensics.in_fp32 import InFp32, in_fp32
from harness.forensics.other_states import with_fp32_moments, without_options
from harness.forensics.rebuild import Rebuilt
from harness.training import Training
from instrument.records import FirstNonfinite
from instrument.replay.examine import Examination, examine
from instrument.replay.snapshot import NamedState, Snapshot

TIMED_SAMPLES = 10
"""Timings of a step are at least this many, over all rounds and steps."""


@dataclass
class ChangedRun:
    """Steps from the snapshot under one change. ``failed_at`` with ``first`` as it surfaced and ``found``, its
    producer, or None; ``applied``: updates that no scaler skipped."""

    failed_at: int | None = None
    first: FirstNonfinite | None = None
    found: Examination | None = None
    applied: int = 0
    skipped: int = 0
    step_time_s: float | None = None
    bytes: int | None = None
    in_fp32: InFp32 | None = None


def run_changed(rebuilt: Rebuilt, change: Change, state: NamedState, last: int, timed: list[int]) -> ChangedRun:
    """Run from the stored state up to ``last`` or to a failure, whose producer is then looked for; where the steps
    are survived, time the ``timed`` ones and weigh the memory."""
    with _training(rebuilt, change) as (training, module):
        snapshot = _snapshot(state, change, rebuilt, training)
        result = _run(training, snapshot, last)
        result.in_fp32 = module
        if result.failed_at is None:
            result.step_time_s, result.bytes = _cost(training, snapshot, timed)
        elif result.first is not None:
            result.found = examine(
                result.failed_at, training.again, snapshot, training.model, training.optimizer, training.precision.scaler
            )
    return result


def run_unchanged(rebuilt: Rebuilt, state: NamedState, last: int, timed: list[int]) -> ChangedRun:
    """The control: the same without a change, its cost measured whether it fails or not."""
    change = Change("unchanged", rebuilt.settings.config)
    with _training(rebuilt, change) as (training, _):
        snapshot = _snapshot(state, change, rebuilt, training)
        result = _run(training, snapshot, last)
        result.step_time_s, result.bytes = _cost(training, snapshot, timed)
    return result


@contextmanager
def _training(rebuilt: Rebuilt, change: Change) -> Iterator[tuple[Training, InFp32 | None]]:
    """A training with the change in it."""
    training = rebuilt.training(change.config)
    precision = training.precision
    if change.module is not None:
        precision.check_logits = lambda logits: None  # their dtype may be what is changed
        if change.stays_fp32:
            precision.loss_dtype = torch.float32
    cast_back = None if change.stays_fp32 else precision.weights_dtype
    try:
        with in_fp32(training.model, change.module, cast_back) if change.module else nullcontext() as seen:
            yield training, seen
    finally:
        precision.close()


def _snapshot(state: NamedState, change: Change, rebuilt: Rebuilt, training: Training) -> Snapshot:
    """The stored state as this training keeps it; options stay the training's own, for they may be the change."""
    state = without_options(state)
    if change.config.optimizer != rebuilt.settings.config.optimizer:
        state = with_fp32_moments(state)
    return Snapshot.from_named(state, training.model, training.optimizer, training.precision.scaler)


def _run(training: Training, snapshot: Snapshot, last: int) -> ChangedRun:
    snapshot.restore()
    result = ChangedRun()
    for step in range(snapshot.step + 1, last + 1):
        reading = training.again(step)
        if reading.divergence is not None:
            result.failed_at, result.first = step, reading.divergence.first_nonfinite
            break
        result.skipped += reading.steps[-1].step_skipped
        result.applied += not reading.steps[-1].step_skipped
    return result


def _cost(training: Training, snapshot: Snapshot, steps: list[int]) -> tuple[float, int]:
    """(seconds, bytes). The seconds are the sum over ``steps``, each at its fastest of several rounds from the
    snapshot; the caller has run them once already, so nothing is warmed up in here. The bytes are the allocator's
    peak on a GPU, and what is counted by `footprint_bytes` on a CPU."""
    device = training.precision.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    best = dict.fromkeys(steps, math.inf)
    for _ in range(max(2, math.ceil(TIMED_SAMPLES / len(steps)))):
        snapshot.restore()
        for step in steps:
            best[step] = min(best[step], training.again(step).steps[-1].step_time_s)
    nbytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else footprint_bytes(training, steps[0])
    return sum(best.values()), nbytes
