"""Training and validation loss of the language models, run by run: what stands when a reference cannot judge."""

from __future__ import annotations

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.statistics import rolling_median
from report.tables.judgement import judge_runs, start_and_end
from report.tables.selection import REFERENCE, in_order, is_control, is_lm
from report.tables.table import Table, data_text, long_frame
from report.text import sentence

NAME = "lm_loss"
COLUMNS = ("case", "dtype_config", "seed", "step", "loss", "val_loss")
WINDOW_STEPS = 10


def table(folder: Folder) -> Table:
    """Every step and evaluation of the LM runs, controls left out; ``loss`` is the rolling median of the training loss."""
    judgements = judge_runs(folder)
    runs = [run for run in in_order(judgements.selection.runs) if is_lm(run) and not is_control(run.dtype_config)]
    runs = [run for run in runs if len(folder.steps(run.run_id)["step"])]
    if not runs:
        return Table.without_data(NAME, COLUMNS, "Loss of the language models", "no language model was run.", folder.marks)
    data = long_frame(runs, COLUMNS, lambda run: _losses(folder, run))
    caption = (
        f"{data_text(folder, runs)} A line a run, judged or not. Left: training loss, rolling median of {WINDOW_STEPS} steps. "
        "Right: validation loss (fp32, held-out rows), a point an evaluation."
    )
    return Table(NAME, NAME, data, _title(folder, runs, judgements.unhealthy), caption, marks=folder.marks)


def _losses(folder: Folder, run: RunRecord) -> dict[str, np.ndarray]:
    """Steps and evaluations of a run in one column of steps; an evaluation before the first update is step 0."""
    columns = folder.steps(run.run_id)
    validated = {evaluation.step: evaluation.val_loss for evaluation in folder.evaluations(run.run_id)}
    extra = np.array(sorted(set(validated) - set(columns["step"].tolist())), dtype=columns["step"].dtype)
    step = np.r_[extra, columns["step"]]
    order = np.argsort(step, kind="stable")
    loss = np.r_[np.full(len(extra), np.nan), rolling_median(columns["loss"], WINDOW_STEPS)]
    known = [validated.get(at) for at in step[order].tolist()]
    return {
        "step": step[order],
        "loss": np.where(np.isfinite(np.r_[np.full(len(extra), np.nan), columns["loss"]]), loss, np.nan)[order],
        "val_loss": np.array([np.nan if value is None else value for value in known], dtype=float),
    }


def _title(folder: Folder, runs: list[RunRecord], unhealthy: dict[str, str]) -> str:
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
