"""G: training loss of single-label beside multi-label, and its distance from fp32_true on the same batch; and training and
validation loss of the language models: what stands when a reference cannot judge."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.statistics import rolling_median
from report.tables.judgement import divergence_text, judge_runs, start_and_end
from report.tables.selection import (
    REFERENCE,
    Selection,
    column_of,
    in_order,
    incomparable_reason,
    is_control,
    is_lm,
    select,
    series_order,
)
from report.tables.table import Table, data_text, frame, identity, long_frame
from report.text import joined, sentence, shortened

COLUMNS = ("case", "kind", "loss_reduction", "arch", "dtype_config", "seed", "step", "loss", "minus_reference")
SUMMARY = tuple("case kind loss_reduction arch dtype_config seed died_at death final_minus_reference run_id".split())
KINDS = {"Cls-Single": "Single-label", "Cls-Multi": "Multi-label"}


def table(folder: Folder) -> Table:
    """All steps of all classification runs."""
    selection = select(folder)
    runs = [run for run in in_order(selection.runs) if not is_lm(run) and len(folder.steps(run.run_id)["step"])]
    data = long_frame(runs, COLUMNS, lambda run: _steps(folder, run, selection))
    summary = frame([_row(folder, run, selection) for run in runs], SUMMARY)
    empty = None if runs else "no classification run"
    title, caption = _title(summary), _caption(folder, runs)
    return Table("G", "g_loss_scale_inversion", data, title, caption, summary, selection.excluded, folder.marks, empty)


def minus_reference(folder: Folder, run: RunRecord, selection: Selection) -> np.ndarray:
    """Loss minus the reference's at the same step, where both saw the same batch; else nan."""
    columns = folder.steps(run.run_id)
    difference = np.full(len(columns["step"]), np.nan)
    reference = selection.reference(run)
    if reference is None or incomparable_reason(run, reference) is not None:
        return difference
    base = folder.steps(reference.run_id)
    _, ours, theirs = np.intersect1d(columns["step"], base["step"], assume_unique=True, return_indices=True)
    difference[ours] = columns["loss"][ours] - base["loss"][theirs]
    return difference


def _steps(folder: Folder, run: RunRecord, selection: Selection) -> dict:
    columns = folder.steps(run.run_id)
    return {
        "kind": KINDS[column_of(run)],
        "loss_reduction": run.loss_reduction,
        "arch": run.arch,
        "step": columns["step"],
        "loss": columns["loss"],
        "minus_reference": minus_reference(folder, run, selection),
    }


def _row(folder: Folder, run: RunRecord, selection: Selection) -> dict:
    difference = minus_reference(folder, run, selection)
    tail = difference[-max(1, len(difference) // 10) :]
    tail = tail[np.isfinite(tail)]
    diverged = run.status == "diverged"
    return identity(run) | {
        "kind": KINDS[column_of(run)],
        "died_at": run.divergence_step,
        "death": divergence_text(run) if diverged else None,
        "final_minus_reference": float(tail.mean()) if len(tail) and not diverged else math.nan,
    }


def _title(summary: pd.DataFrame) -> str:
    """Where fp16_naive and its controls diverge, by kind."""
    if summary.empty:
        return "Not decided: no classification run."
    stressed = summary[summary["dtype_config"].str.startswith("fp16_naive")]
    if stressed.empty:
        return "Not decided: fp16_naive was not run on classification."
    configs = series_order(stressed["dtype_config"])
    counts = {config: _diverged(stressed[stressed["dtype_config"] == config]) for config in configs}
    stable = [config for config in configs if not any(diverged for diverged, _ in counts[config].values())]
    unstable = [config for config in configs if config not in stable]
    parts = [_divergences(config, counts[config], first=config == unstable[0]) for config in unstable]
    if stable:
        n = sum(runs for config in stable for _, runs in counts[config].values())
        parts.append(f"{joined(stable)} {'does' if len(stable) == 1 else 'do'} not diverge ({count(n, 'run')})")
    return sentence("; ".join(parts))


def _diverged(rows: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Kind -> (runs that diverged, runs), of the kinds that ran."""
    return {
        kind: (int(of_kind["died_at"].notna().sum()), len(of_kind))
        for kind in KINDS.values()
        if len(of_kind := rows[rows["kind"] == kind])
    }


def _divergences(config: str, of_kind: dict[str, tuple[int, int]], *, first: bool) -> str:
    """The first configuration's text says what the numbers are; those after it need not repeat it."""
    if first:
        parts = [f"{bad} of {count(n, f'{kind.lower()} run')}" for kind, (bad, n) in of_kind.items()]
        return f"{config} diverges in {joined(parts)}"
    return f"{config} in {joined(f'{bad} of {n}' for bad, n in of_kind.values())}"


def _caption(folder: Folder, runs: list[RunRecord]) -> str:
    reductions = shortened(sorted({run.loss_reduction for run in runs}))
    return (
        f"{data_text(folder, runs)} Training loss before each update; single-label is softmax cross-entropy, multi-label "
        f"binary cross-entropy with logits, so the units differ and each facet has its own axis (reduction: {reductions}). "
        "Below: the loss minus fp32_true's at the same step, that is on the same batch from the same initial weights. "
        "Crosses: divergence."
    )


LM_COLUMNS = ("case", "dtype_config", "seed", "step", "loss", "val_loss")
LM_WINDOW_STEPS = 10


def lm_loss(folder: Folder) -> Table:
    """Every step and evaluation of the LM runs, controls left out; ``loss`` is the rolling median of the training loss."""
    judgements = judge_runs(folder)
    runs = [run for run in in_order(judgements.selection.runs) if is_lm(run) and not is_control(run.dtype_config)]
    runs = [run for run in runs if len(folder.steps(run.run_id)["step"])]
    if not runs:
        return Table.without_data(
            "lm_loss", LM_COLUMNS, "Loss of the language models", "no language model was run.", folder.marks
        )
    data = long_frame(runs, LM_COLUMNS, lambda run: _losses(folder, run))
    caption = (
        f"{data_text(folder, runs)} A line a run, judged or not. Left: training loss, rolling median of {LM_WINDOW_STEPS} "
        "steps. Right: validation loss (fp32, held-out rows), a point an evaluation."
    )
    return Table("lm_loss", "lm_loss", data, _learnt(folder, runs, judgements.unhealthy), caption, marks=folder.marks)


def _losses(folder: Folder, run: RunRecord) -> dict[str, np.ndarray]:
    """Steps and evaluations of a run in one column of steps; an evaluation before the first update is step 0."""
    columns = folder.steps(run.run_id)
    validated = {evaluation.step: evaluation.val_loss for evaluation in folder.evaluations(run.run_id)}
    extra = np.array(sorted(set(validated) - set(columns["step"].tolist())), dtype=columns["step"].dtype)
    step = np.r_[extra, columns["step"]]
    order = np.argsort(step, kind="stable")
    loss = np.r_[np.full(len(extra), np.nan), rolling_median(columns["loss"], LM_WINDOW_STEPS)]
    known = [validated.get(at) for at in step[order].tolist()]
    return {
        "step": step[order],
        "loss": np.where(np.isfinite(np.r_[np.full(len(extra), np.nan), columns["loss"]]), loss, np.nan)[order],
        "val_loss": np.array([np.nan if value is None else value for value in known], dtype=float),
    }


def _learnt(folder: Folder, runs: list[RunRecord], unhealthy: dict[str, str]) -> str:
    """From where to where fp32_true of each case learns, by its seeds; why it cannot judge where it cannot."""
    parts = []
    for case in dict.fromkeys(run.case for run in runs):
        ends = [start_and_end(folder, run) for run in runs if (run.case, run.dtype_config) == (case, REFERENCE)]
        known = [end for end in ends if end is not None]
        if case in unhealthy:
            parts.append(f"{case} is measured, not judged: {unhealthy[case]}")
        elif known:
            starts, lasts, (what, *_) = zip(*known, strict=True)
            parts.append(f"fp32_true takes {case} from {max(starts):.3g} to {max(lasts):.3g} nats of {what}")
        else:
            parts.append(f"{case} has no fp32_true run that ended")
    return sentence("; ".join(parts))
