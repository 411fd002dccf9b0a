"""E: the largest logit of every step beside what fp16 can hold."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from bench_cases import TASKS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from kernels.float_formats import FP16
from report.tables.selection import in_order, is_lm, select
from report.tables.table import Table, data_text, frame, identity, long_frame
from report.text import sentence, span

FORWARD = ("forward", "loss")
COLUMNS = ("case", "dtype_config", "seed", "step", "logit_absmax", "nonfinite")
SUMMARY = tuple(
    "case dtype_config seed max median over_fp16_steps nonfinite_steps overflow_steps logits_per_step n_steps run_id".split()
)


def table(folder: Folder) -> Table:
    """All steps of all runs; the summary has one row a violin."""
    selection = select(folder)
    runs = [
        run
        for run in in_order(selection.runs)
        if np.isfinite(folder.steps(run.run_id)["logit_absmax"]).any() or nonfinite_logits(folder, run).any()
    ]
    data = long_frame(
        runs,
        COLUMNS,
        lambda run: {
            "step": folder.steps(run.run_id)["step"],
            "logit_absmax": folder.steps(run.run_id)["logit_absmax"],
            "nonfinite": nonfinite_logits(folder, run),
        },
    )
    summary = frame([_row(folder, run) for run in runs], SUMMARY)
    empty = None if runs else "no run logged its logits"
    title, caption = _title(summary), _caption(folder, runs, summary)
    return Table("E", "e_logit_magnitude", data, title, caption, summary, selection.excluded, folder.marks, empty)


def nonfinite_logits(folder: Folder, run: RunRecord) -> np.ndarray:
    """Steps at which some logit was not finite."""
    columns = folder.steps(run.run_id)
    return (columns["logit_nonfinite"] > 0) | np.isinf(columns["logit_absmax"])


def over_fp16(folder: Folder, run: RunRecord) -> np.ndarray:
    """Steps at which some finite logit lies beyond what fp16 can hold."""
    columns = folder.steps(run.run_id)
    finite = np.where(np.isfinite(columns["logit_absmax"]), columns["logit_absmax"], 0.0)
    return (columns["logit_over_fp16"] > 0) | (finite > FP16.max)


def overflows(folder: Folder, run: RunRecord) -> np.ndarray:
    """Steps at which the logits themselves left fp16's range. From the step of divergence on they are
    non-finite because a parameter is, unless the run diverged in its forward pass."""
    first, diverged_at = run.first_nonfinite, run.divergence_step
    beyond = over_fp16(folder, run) | nonfinite_logits(folder, run)
    if diverged_at is None:
        return beyond
    last = diverged_at if first is not None and first.phase in FORWARD else diverged_at - 1
    return beyond & (folder.steps(run.run_id)["step"] <= last)


def logits_per_step(folder: Folder, run: RunRecord) -> float:
    """How many logits a step's maximum is over (targets of a language model, or documents, times outputs); nan when the record
    does not say: of masked language modelling one token in seven is a target, and old logs do not count them."""
    data = run.flags.get("data") or {}
    if is_lm(run):
        columns = folder.steps(run.run_id)
        every = TASKS[run.task].head == "causal_lm"  # there every real token is a target
        outputs, rows = data.get("vocabulary"), float(np.median(columns["real_tokens" if every else "targets"]))
    else:
        multi = TASKS[run.task].loss == "bce_with_logits"
        outputs, rows = data.get("labels" if multi else "classes"), run.batch_size
    return outputs * rows if outputs else math.nan


def _row(folder: Folder, run: RunRecord) -> dict:
    absmax = folder.steps(run.run_id)["logit_absmax"]
    finite = absmax[np.isfinite(absmax)]
    return identity(run) | {
        "max": float(finite.max()) if len(finite) else math.nan,
        "median": float(np.median(finite)) if len(finite) else math.nan,
        "over_fp16_steps": int(over_fp16(folder, run).sum()),
        "nonfinite_steps": int(nonfinite_logits(folder, run).sum()),
        "overflow_steps": int(overflows(folder, run).sum()),
        "logits_per_step": logits_per_step(folder, run),
        "n_steps": len(absmax),
    }


def _title(summary: pd.DataFrame) -> str:
    if summary.empty:
        return "Not decided: no logits were logged."
    beyond = summary[summary["overflow_steps"] > 0]
    if summary["max"].notna().any():
        top = summary.loc[summary["max"].idxmax()]
        largest = f"the largest logit is {top['max']:,.4g} ({top['dtype_config']}, {top['case']})"
    else:
        largest = "no logit was finite"
    if beyond.empty:
        bits = math.log2(FP16.max / summary["max"].max())
        return sentence(f"no logit leaves fp16's range: {largest}, {bits:.1f} bits below 65,504")
    return sentence(f"logits leave fp16's range in {len(beyond)} of {count(len(summary), 'run')}; {largest}")


def _caption(folder: Folder, runs: list[RunRecord], summary: pd.DataFrame) -> str:
    numbers = summary["logits_per_step"].dropna() if len(summary) else pd.Series(dtype=float)
    per_step = f"{span(numbers, ',.0f')} logits a step" if len(numbers) else "the number of logits a step is not recorded"
    return (
        f"{data_text(folder, runs)} Violin and box of each step's largest finite logit, one a seed, its maximum written "
        f"({per_step}; pad columns and ignored targets left out). Line: 65,504, the largest fp16 number. What lies "
        "beyond it would overflow in fp16; in bf16 and fp32 it did not. Steps with non-finite logits are marks on top; "
        "from a run's divergence on they follow from non-finite parameters and are no overflow of the logits."
    )
