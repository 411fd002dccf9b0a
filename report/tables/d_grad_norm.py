"""D: gradient norm before clipping, step by step: divergence, loss-scaler skips and spikes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.errors import UsageError
from report.statistics import FEWEST_STEPS, SPIKE_FACTOR, WINDOW_STEPS, spikes
from report.tables.selection import REFERENCE, Selection, in_order, select, series_order
from report.tables.table import Table, data_text, frame, identity, long_frame
from report.text import joined, sentence, shortened, span

COLUMNS = ("case", "dtype_config", "seed", "step", "grad_norm", "skipped", "spike", "last_finite")
SUMMARY = tuple("case dtype_config seed n_steps spikes spikes_per_1000 relative_to_fp32 skips died_at run_id".split())
STRESSED = "fp16_naive"
SHOWN = (STRESSED, "amp_bf16", REFERENCE, *DTYPE_CONFIGS[STRESSED].controls)


def table(folder: Folder, more: tuple[str, ...] = ()) -> Table:
    """All steps of the shown configurations, and of ``more`` that someone asked for. Spikes are found before anyone
    thins the lines out. Raises `UsageError` for a configuration that the folder does not hold."""
    selection = select(folder)
    ran = series_order({run.dtype_config for run in folder.runs})
    if unknown := [config for config in more if config not in ran]:
        raise UsageError(f"no run of {shortened(unknown)} for the heartbeat; this folder has {joined(ran)}")
    configs = tuple(dict.fromkeys((*SHOWN, *more)))
    runs = [run for run in in_order(selection.runs) if run.dtype_config in configs and len(folder.steps(run.run_id)["step"])]
    data = long_frame(runs, COLUMNS, lambda run: _steps(folder, run))
    summary = _summary(folder, runs, selection)
    empty = None if runs else f"none of {', '.join(configs)} was run"
    title, caption = _title(summary), _caption(folder, runs)
    return Table("D", "d_grad_norm_heartbeat", data, title, caption, summary, selection.excluded, folder.marks, empty)


def _steps(folder: Folder, run: RunRecord) -> dict:
    columns = folder.steps(run.run_id)
    norm = columns["grad_norm"]
    last = np.zeros(len(norm), dtype=bool)
    if run.status == "diverged" and np.isfinite(norm).any():
        last[np.flatnonzero(np.isfinite(norm))[-1]] = True
    return {
        "step": columns["step"],
        "grad_norm": norm,
        "skipped": columns["step_skipped"],
        "spike": spikes(norm) & ~columns["step_skipped"],
        "last_finite": last,
    }


def _summary(folder: Folder, runs: list[RunRecord], selection: Selection) -> pd.DataFrame:
    rates = {run.run_id: _rate(folder, run) for run in runs}
    rows = []
    for run in runs:
        n, found, rate = rates[run.run_id]
        reference = selection.reference(run)
        base = rates[reference.run_id][2] if reference and reference.run_id in rates else math.nan
        rows.append(
            identity(run)
            | {"n_steps": n, "spikes": found, "spikes_per_1000": rate, "relative_to_fp32": rate / base if base else math.nan}
            | {"skips": run.scaler_skips, "died_at": run.divergence_step}
        )
    return frame(rows, SUMMARY)


def _rate(folder: Folder, run: RunRecord) -> tuple[int, int, float]:
    """Steps, spikes, and spikes per 1,000 steps that had enough steps before them to be judged."""
    found, n = int(_steps(folder, run)["spike"].sum()), len(folder.steps(run.run_id)["step"])
    return n, found, 1000 * found / (n - FEWEST_STEPS) if n > FEWEST_STEPS else math.nan


def _title(summary: pd.DataFrame) -> str:
    if summary.empty:
        return "Not decided: no gradient norms."
    parts = []
    for config in series_order(summary["dtype_config"]):
        rows = summary[summary["dtype_config"] == config]
        diverged = rows[rows["died_at"].notna()]
        if len(diverged):
            when = ("step " if diverged["died_at"].nunique() == 1 else "steps ") + span(diverged["died_at"], ".0f")
            parts.append(f"{config} diverges at {when} in {len(diverged)} of {count(len(rows), 'run')}")
    judged = summary[summary["n_steps"] > FEWEST_STEPS]
    counts = [
        f"{config} {rows['spikes'].sum()} in {(rows['n_steps'] - FEWEST_STEPS).sum():,}"
        for config in series_order(judged["dtype_config"])
        if len(rows := judged[judged["dtype_config"] == config])
    ]
    return sentence("; ".join([*parts, f"spikes in steps: {shortened(counts, 4)}"] if counts else parts))


def _caption(folder: Folder, runs: list[RunRecord]) -> str:
    return (
        f"{data_text(folder, runs)} Global L2 norm of the gradient before clipping, after unscaling. Cross: the last "
        "finite step of a run that diverged. Marks above the frame: steps that the loss scaler skipped, which is no "
        f"divergence. Spike: above {SPIKE_FACTOR:g} times the median of the {WINDOW_STEPS} steps before it; a norm that "
        "spikes as often under fp32_true is not a matter of precision. The controls change one thing in fp16_naive "
        "each: epsilon 1e-4, or fp32 AdamW states."
    )
