"""A run's state, judged against fp32_true of the same case and seed.

Poor quality: completed, and the loss above the reference's by more than 0.2 nats (language models) or 10 % (classification), or
micro-F1 down by more than 2 points. The loss is the validation loss; imported logs have the mean of the last tenth of the
training losses. A reference that ends above its start is unhealthy, and its case is not judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.tables.selection import REFERENCE, Selection, incomparable_reason, is_lm, select
from report.text import signed

POOR_NATS = 0.2
POOR_SHARE = 0.10
POOR_F1 = 0.02
FEWEST_F1 = 0.05
"""A reference below this micro-F1 has learned no labels yet: it is judged by loss alone."""

FAILED = ("oom", "error", "hung")
FROM_OUTSIDE = ("killed", "node_lost")
"""Causes of failures that say nothing about the run."""


@dataclass(frozen=True)
class Judged:
    """A run with its ``state`` (``completed``, ``poor``, ``diverged``, ``unsupported``, ``failed``, ``unjudged``,
    ``unfinished``: ended from outside), the ``reason`` as text, and its distance from the reference: ``gap`` in ``unit``
    (nats, or a share of the reference's loss), ``f1_gap`` as a difference of micro-F1."""

    run: RunRecord
    state: str
    reason: str = ""
    gap: float | None = None
    unit: str | None = None
    f1_gap: float | None = None


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


def unhealthy_reason(folder: Folder, reference: RunRecord) -> str | None:
    """Why a reference is unhealthy, or None. One that failed for another reason is no reference."""
    if reference.status == "diverged":
        return f"it diverged at step {reference.divergence_step}"
    losses = start_and_end(folder, reference) if reference.status == "completed" else None
    if losses is None or losses[1] < losses[0]:
        return None
    start, end, what = losses
    return f"its {what} ends above its start: {end:.3g} against {start:.3g} (seed {reference.seed})"


def _judge(folder: Folder, run: RunRecord, selection: Selection, unhealthy: dict[str, str]) -> Judged:
    if run.status == "diverged":
        return Judged(run, "diverged", divergence_text(run))
    if run.status == "unsupported":
        return Judged(run, "unsupported", run.error or "unsupported")
    if is_unfinished(run):
        return Judged(run, "unfinished", run.error or run.status)
    if run.status in FAILED:
        return Judged(run, "failed", f"{run.status}: {run.error}" if run.error else run.status)
    if run.case in unhealthy:
        return Judged(run, "unjudged", f"reference unhealthy: {unhealthy[run.case]}")
    reference = selection.reference(run)
    if reference is None or reference.status != "completed":
        return Judged(run, "unjudged", "no fp32_true run of this case and seed completed")
    if run is reference:
        return Judged(run, "completed")
    if (reason := incomparable_reason(run, reference)) is not None:
        return Judged(run, "unjudged", f"not comparable: {reason}")
    return _against(run, reference)


def is_unfinished(run: RunRecord) -> bool:
    """Whether a run was stopped or killed from outside."""
    failure = run.flags.get("death")
    return run.status == "preempted" or (isinstance(failure, dict) and failure.get("cause") in FROM_OUTSIDE)


def _against(run: RunRecord, reference: RunRecord) -> Judged:
    """A completed run beside its healthy reference."""
    ours, theirs, what = final_losses(run, reference)
    if ours is None or theirs is None:
        return Judged(run, "unjudged", "no final loss to judge by")
    gap, unit, limit = (ours - theirs, "nats", POOR_NATS) if is_lm(run) else (ours / theirs - 1, "share", POOR_SHARE)
    f1_gap = None
    if run.f1_micro is not None and reference.f1_micro is not None and reference.f1_micro >= FEWEST_F1:
        f1_gap = run.f1_micro - reference.f1_micro
    if not math.isfinite(ours) or gap > limit:
        return Judged(run, "poor", f"{what} {gap_text(gap, unit)} against fp32_true", gap, unit, f1_gap)
    if f1_gap is not None and f1_gap < -POOR_F1:
        return Judged(run, "poor", f"micro-F1 {100 * f1_gap:+.1f} points against fp32_true", gap, unit, f1_gap)
    return Judged(run, "completed", "", gap, unit, f1_gap)


def final_losses(run: RunRecord, reference: RunRecord) -> tuple[float | None, float | None, str]:
    """Both final losses by the same measure: validation when both have it, else training."""
    if run.val_loss is not None and reference.val_loss is not None:
        return run.val_loss, reference.val_loss, "validation loss"
    return run.train_loss_final, reference.train_loss_final, "training loss"


def gap_text(gap: float, unit: str) -> str:
    """``+0.31 nats`` or ``+12 %``."""
    return f"{signed(gap, 2)} nats" if unit == "nats" else f"{signed(100 * gap, 1)} %"


def divergence_text(run: RunRecord) -> str:
    """``NaN @ 50``: how a run diverged and at which step."""
    return f"{divergence_kind(run)} @ {run.divergence_step}"


def divergence_kind(run: RunRecord) -> str:
    """``NaN``, ``Inf``, or ``exploded`` when every value was finite."""
    kind = run.first_nonfinite.kind if run.first_nonfinite else (run.flags.get("imported") or {}).get("divergence_kind")
    return {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}.get(kind, "exploded")
