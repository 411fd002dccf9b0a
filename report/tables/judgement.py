"""A run's state, beside fp32_true of the same case and seed, and whether a case's reference is healthy.

Margins, and why. 0.02 nats (2 % of the perplexity) is what 13 % more compute buys a language model at a loss of 3.3 (loss
proportional to compute to the power -0.05: Kaplan et al. 2020): a 16-bit configuration that costs more gives back what it
saves. One point of F1 is about the standard error of F1 on some thousand documents. A classifier's loss, whose scale no user
meets, may be 5 % higher. Speeds within 2 % serve alike. A reference has learnt when its loss fell by twice the margin: else one
that learns nothing at all would lie within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from kernels.float_formats import FP32
from report.tables.selection import REFERENCE, Selection, incomparable_reason, is_lm, select

MARGIN_NATS = 0.02
MARGIN_LOSS = 0.05
MARGIN_F1 = 0.01
MARGIN_SPEED = math.log(1.02)

FAILED = ("oom", "error", "hung")
FROM_OUTSIDE = ("killed", "node_lost")
"""Causes of failures that say nothing about the run."""


@dataclass(frozen=True)
class Judged:
    """A run with its ``state`` (``completed``, ``stalled``, ``diverged``, ``unsupported``, ``failed``, ``unjudged``,
    ``unfinished``: ended from outside) and the ``reason`` as text."""

    run: RunRecord
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Judgements:
    """All runs of a selection, judged."""

    selection: Selection
    by_id: dict[str, Judged]
    unhealthy: dict[str, str]
    """Case -> why its reference is unhealthy."""

    def of(self, case: str, config: str) -> list[Judged]:
        """A cell's runs in order of seed."""
        found = [j for j in self.by_id.values() if (j.run.case, j.run.dtype_config) == (case, config)]
        return sorted(found, key=lambda judged: judged.run.seed)


def judge_runs(folder: Folder, selection: Selection | None = None) -> Judgements:
    """Every selected run's state."""
    selection = selection or select(folder)
    unhealthy = {
        run.case: reason
        for run in selection.runs
        if run.dtype_config == REFERENCE and (reason := unhealthy_reason(folder, run)) is not None
    }
    return Judgements(selection, {run.run_id: _judge(folder, run, selection, unhealthy) for run in selection.runs}, unhealthy)


def start_and_end(folder: Folder, run: RunRecord) -> tuple[float, float, str] | None:
    """A run's loss at its start and its end and what loss that is, or None when there is no end."""
    first = next((e.val_loss for e in folder.evaluations(run.run_id) if e.step == 0), None)
    if first is not None and run.val_loss is not None:
        return first, run.val_loss, "validation loss"
    if run.loss_initial is not None and run.train_loss_final is not None:
        return run.loss_initial, run.train_loss_final, "training loss"
    return None


def finite(loss: float | None) -> bool:
    """Whether a loss is known and a number that fp32 holds."""
    return loss is not None and abs(loss) <= FP32.max


def unhealthy_reason(folder: Folder, reference: RunRecord) -> str | None:
    """Why a reference is unhealthy, or None. One that failed for another reason is no reference."""
    if reference.status == "diverged":
        return f"it diverged at step {reference.divergence_step} (seed {reference.seed})"
    if (why := reference.stalled) is not None:
        return f"it stalled: {why} (seed {reference.seed})"
    if reference.status != "completed":
        return None
    losses = start_and_end(folder, reference)
    if losses is None:
        return f"no loss says whether it learnt (seed {reference.seed})"
    start, end, what = losses
    if end >= start:
        return f"its {what} ends above its start: {end:.3g} against {start:.3g} (seed {reference.seed})"
    if start - end >= (2 * MARGIN_NATS if is_lm(reference) else 2 * MARGIN_LOSS * start) or _above_majority(reference):
        return None
    return f"it learnt nothing: its {what} went from {start:.5g} to {end:.5g} (seed {reference.seed})"


def _above_majority(run: RunRecord) -> bool:
    """Whether a classifier scores more than the most frequent answer."""
    known = run.f1_micro is not None and run.f1_micro_majority is not None
    return known and run.f1_micro > run.f1_micro_majority + 2 * MARGIN_F1


def _judge(folder: Folder, run: RunRecord, selection: Selection, unhealthy: dict[str, str]) -> Judged:
    if run.status == "diverged":
        return Judged(run, "diverged", divergence_text(run))
    if run.status == "unsupported":
        return Judged(run, "unsupported", run.error or "unsupported")
    if is_unfinished(run):
        return Judged(run, "unfinished", run.error or run.status)
    if run.status in FAILED:
        return Judged(run, "failed", f"{run.status}: {run.error}" if run.error else run.status)
    if run.val_loss is not None and not finite(run.val_loss):
        return Judged(run, "failed", f"validation loss {run.val_loss}")
    if (why := run.stalled) is not None and run.dtype_config != REFERENCE:
        return Judged(run, "stalled", f"stalled: {why}")
    if run.case in unhealthy:
        return Judged(run, "unjudged", f"reference unhealthy: {unhealthy[run.case]}")
    reference = selection.reference(run)
    if reference is None or reference.status != "completed":
        return Judged(run, "unjudged", "no fp32_true run of this case and seed completed")
    if run is not reference and (reason := incomparable_reason(run, reference)) is not None:
        return Judged(run, "unjudged", f"not comparable: {reason}")
    return Judged(run, "completed")


def is_unfinished(run: RunRecord) -> bool:
    """Whether a run was stopped or killed from outside."""
    failure = run.flags.get("death")
    return run.status == "preempted" or (isinstance(failure, dict) and failure.get("cause") in FROM_OUTSIDE)


def divergence_text(run: RunRecord) -> str:
    """``NaN @ 50``: how a run diverged and at which step."""
    return f"{divergence_kind(run)} @ {run.divergence_step}"


def divergence_kind(run: RunRecord) -> str:
    """``NaN``, ``Inf``, or ``exploded`` when every value was finite."""
    kind = run.first_nonfinite.kind if run.first_nonfinite else (run.flags.get("imported") or {}).get("divergence_kind")
    return {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}.get(kind, "exploded")
