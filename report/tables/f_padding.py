"""F: what padding costs: utilisation of real tokens, batch by batch, classification against LM."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.statistics import block_bootstrap, coefficient_of_variation
from report.tables.selection import REFERENCE, in_order, is_bucketed, is_lm, select, series_order
from report.tables.speed import FIELD, TOKENS, eligible, timed, y_kind
from report.tables.table import Table, data_text, frame, identity, long_frame
from report.text import sentence

COLUMNS = tuple(
    "case kind arch dtype_config seed order real_tokens tokens mfu_real mfu_all real_tokens_per_s tokens_per_s y_kind "
    "bucketed".split()
)
SUMMARY = tuple(
    "case kind arch dtype_config seed tax cv_real cv_real_low cv_real_high cv_all rate_real rate_all y_kind bucketed "
    "n_steps run_id".split()
)
FAVOURITE = "amp_bf16"
NO_REAL_TOKENS = "its log does not separate real tokens from padding"
KINDS = {"classification": "classification", "LM": "language modelling"}
RATES = {False: ("mfu_real", "mfu_all"), True: ("real_tokens_per_s", "tokens_per_s")}
"""By whether tokens per second stand in for an MFU that was not measured."""


def table(folder: Folder, config: str | None = None) -> Table:
    """Timed batches of one configuration (default: amp_bf16), sorted by real tokens."""
    plain, by_length = select(folder, lambda run: not is_bucketed(run)), select(folder, is_bucketed)
    chosen = [eligible(folder, selection) for selection in (plain, by_length)]
    entered = [run for runs, _ in chosen for run in runs if real_tokens_known(run)]
    reasons = [pair for _, pairs in chosen for pair in pairs]
    reasons += [(run.run_id, NO_REAL_TOKENS) for runs, _ in chosen for run in runs if not real_tokens_known(run)]
    config = config or favourite(entered)
    runs = [run for run in in_order(entered) if run.dtype_config == config]
    kind = y_kind(runs) or TOKENS
    data = long_frame(runs, COLUMNS, lambda run: _by_length(folder, run, kind))
    summary = frame([padding_of(folder, run, kind) for run in runs], SUMMARY)
    excluded = tuple(pair for pair in reasons if folder.by_id[pair[0]].dtype_config == config)
    empty = None if runs else "no completed run has enough timed steps and known real tokens"
    title, caption = _title(summary), _caption(folder, runs, config, kind)
    return Table("F", "f_padding_tax", data, title, caption, summary, excluded, folder.marks, empty)


def real_tokens_known(run: RunRecord) -> bool:
    """Whether the log separates real tokens from padding; an imported one may not."""
    return (run.flags.get("imported") or {}).get("real_tokens_known", True)


def real_rates(folder: Folder, run: RunRecord, kind: str) -> tuple[float, float]:
    """Utilisation of real tokens over a run's timed steps (total over total), and its coefficient of variation over them."""
    steps = _timed(folder, run, kind)
    real, time_s = steps[RATES[kind == TOKENS][0]], steps["step_time_s"]
    known = np.isfinite(real)
    if known.sum() < 2:
        return math.nan, math.nan
    return float((real * time_s)[known].sum() / time_s[known].sum()), float(coefficient_of_variation(real[known]))


def padding_of(folder: Folder, run: RunRecord, kind: str) -> dict:
    """One run's tax (the share of its work that padding was) and how much its batches vary."""
    steps = _timed(folder, run, kind)
    real, both = (steps[name] for name in RATES[kind == TOKENS])
    known = np.isfinite(real) & np.isfinite(both)
    time_s = steps["step_time_s"][known]
    work_real, work_all = (float((rate[known] * time_s).sum()) for rate in (real, both))
    variation = block_bootstrap(real, coefficient_of_variation)  # in order of time: neighbours are alike
    return identity(run) | {
        "kind": _kind(run),
        "tax": 1 - work_real / work_all if known.any() else math.nan,
        "cv_real": variation.value,
        "cv_real_low": variation.low,
        "cv_real_high": variation.high,
        "cv_all": float(coefficient_of_variation(both[known])) if known.sum() > 1 else math.nan,
        "rate_real": work_real / time_s.sum() if known.any() else math.nan,
        "rate_all": work_all / time_s.sum() if known.any() else math.nan,
        "y_kind": kind,
        "bucketed": is_bucketed(run),
        "n_steps": int(known.sum()),
    }


def _by_length(folder: Folder, run: RunRecord, kind: str) -> dict:
    """The run's timed steps in order of real tokens."""
    steps = _timed(folder, run, kind)
    order = np.argsort(steps["real_tokens"], kind="stable")
    return {
        "kind": _kind(run),
        "arch": run.arch,
        "order": np.arange(len(order)),
        "y_kind": kind,
        "bucketed": is_bucketed(run),
        **{name: column[order] for name, column in steps.items() if name in COLUMNS},
    }


def _timed(folder: Folder, run: RunRecord, kind: str) -> dict[str, np.ndarray]:
    """The run's timed steps in order of time."""
    columns, keep = folder.steps(run.run_id), timed(folder, run)
    picked = {name: columns[name][keep] for name in ("real_tokens", "tokens", "step_time_s")}
    unknown = np.full(int(keep.sum()), np.nan)
    field = FIELD.get(kind)
    return {
        **picked,
        "mfu_real": columns[f"{field}_real_tokens"][keep] if field else unknown,
        "mfu_all": columns[field][keep] if field else unknown,
        "real_tokens_per_s": picked["real_tokens"] / picked["step_time_s"],
        "tokens_per_s": picked["tokens"] / picked["step_time_s"],
    }


def _kind(run: RunRecord) -> str:
    return "LM" if is_lm(run) else "classification"


def favourite(runs: list[RunRecord]) -> str:
    """The configuration that entered with most cases; amp_bf16, then fp32_true, then registry order."""
    cases = {
        config: len({run.case for run in runs if run.dtype_config == config}) for config in {run.dtype_config for run in runs}
    }
    order = series_order(cases)
    preferred = [config for config in (FAVOURITE, REFERENCE) if config in cases] + order
    return min(preferred, key=lambda config: (-cases[config], preferred.index(config)), default=FAVOURITE)


def _title(summary: pd.DataFrame) -> str:
    plain = summary[~summary["bucketed"].astype(bool)] if len(summary) else summary
    if plain.empty or plain["tax"].isna().all():
        return "Not decided: no timed batches."
    found = [
        (name, rows["tax"].mean(), rows["cv_real"].mean())
        for kind, name in KINDS.items()
        if len(rows := plain[plain["kind"] == kind])
    ]
    (name, tax, variation), *others = found
    text = f"padding is {100 * tax:.0f} % of {name}'s work (coefficient of variation {variation:.2f})"
    for name, tax, variation in others:
        text += f" and {100 * tax:.0f} % of {name}'s ({variation:.2f})"
    return sentence(text)


def _caption(folder: Folder, runs: list[RunRecord], config: str, kind: str) -> str:
    what = {
        "bf16 peak": "MFU against the card's bf16 peak",
        "measured peak": "MFU against this machine's measured matmul rate",
        TOKENS: "Tokens per second (no MFU was measured)",
    }[kind]
    return (
        f"{data_text(folder, runs)} {config}. {what}, of real tokens (thick) and of all tokens (thin), over batches "
        "sorted by their real tokens; the gap is what padding costs. Tax: one minus the share of real work in all work, "
        "total over total. Coefficient of variation of the real-token rate over steps, with a moving-block bootstrap "
        "interval within the run. LM documents are packed without padding."
    )
