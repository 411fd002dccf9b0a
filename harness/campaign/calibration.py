"""What the calibration's short runs say a run costs. Reads rows; starts nothing.

A few steps of each case under three configurations (one of each kind: fp32, autocast, all in 16 bits); the others are taken
to cost what the one of their kind does, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench_cases import DTYPE_CONFIGS
from harness.campaign.plan import Cost, Variant
from instrument.results.folder import finished_runs
from instrument.results.schemas import RunRecord

STEPS = 8
FOLDER = Path("campaign") / "calibration"
"""Its own results folder, inside the campaign's."""
START_S = 4.0
"""A run's process until its own clock begins (a fork, the GPU's context): assumed, not measured."""
UNSUPPORTED_S = 1.0
REPRESENTATIVES = {"fp32": "fp32_true", "autocast": "amp_bf16", "pure": "fp16_naive"}
FALLBACK = {"autocast": ("fp32",), "pure": ("autocast", "fp32"), "fp32": ()}
"""Whose cost stands in, as an upper bound, where a kind has none of its own."""


def kind(config: str) -> str:
    """fp32, autocast or pure: what decides a configuration's speed."""
    declared = DTYPE_CONFIGS[config]
    return "fp32" if declared.compute == "fp32" else "autocast" if declared.autocast else "pure"


def representatives(configs: Sequence[str]) -> list[str]:
    """The configurations to calibrate: of every kind that is asked for its representative, or its first."""
    kinds = list(dict.fromkeys(kind(config) for config in configs))
    return [REPRESENTATIVES[k] if REPRESENTATIVES[k] in configs else next(c for c in configs if kind(c) == k) for k in kinds]


def costs(rows: Mapping[str, Iterable[RunRecord]]) -> dict[tuple[str, str], Cost]:
    """By (case label, configuration), what the calibration's rows, by label, have measured."""
    return {
        (label, row.dtype_config): cost for label, found in rows.items() for row in found if (cost := cost_of(row)) is not None
    }


def spread(known: Mapping[tuple[str, str], Cost], labels: Sequence[str], configs: Sequence[str]) -> dict[tuple[str, str], Cost]:
    """A cost for every case and configuration: its own, or that of its kind, or (a calibration that was cut) that of the
    dearest other case. Empty where nothing at all is known."""
    found: dict[tuple[str, str], Cost] = {}
    for label in labels:
        own = {config: cost for (case, config), cost in known.items() if case == label}
        found |= {(label, config): cost for config in configs if (cost := _of(config, own)) is not None}
    for config in configs:
        others = {label: found[label, config] for label in labels if (label, config) in found}
        if others:
            dearest = max(others, key=lambda label: others[label].seconds(100))
            for label in labels:
                found.setdefault((label, config), replace(others[dearest], source=f"as {dearest}"))
    return found


def cost_of(row: RunRecord) -> Cost | None:
    """From one short run; None from one that failed."""
    total_s = (row.flags.get("timings_s") or {}).get("total")
    peak = row.peak_allocated_bytes
    if row.status == "unsupported":
        return Cost(UNSUPPORTED_S, 0.0, "measured: unsupported here")
    if total_s is None or row.status not in ("completed", "diverged"):
        return None
    steps_s = (row.flags.get("timings_s") or {}).get("steps", 0.0)
    step_s = row.step_time_p50_s if row.step_time_p50_s is not None else steps_s / max(1, row.steps_done)
    died = row.status == "diverged"
    controls = len(DTYPE_CONFIGS[row.dtype_config].controls) if died else 0
    # The first steps compile and allocate: that is no cost of a step, but one of every run.
    return Cost(START_S + max(0.0, total_s - row.steps_done * step_s), step_s, "measured", died, controls, peak)


def _of(config: str, measured: Mapping[str, Cost]) -> Cost | None:
    if config in measured:
        return measured[config]
    for k in (kind(config), *FALLBACK[kind(config)]):
        for other, cost in measured.items():
            if kind(other) == k and cost.step_s > 0:
                return replace(cost, source=f"as {other}", died=False, controls=0)
    return None


def calibrated(results: Path, labels: Sequence[str]) -> dict[tuple[str, str], Cost]:
    """What the results folder of a campaign's calibration has measured, by (case label, configuration)."""
    rows = [row for row in finished_runs(results / FOLDER) if row.max_steps == STEPS]
    lengths = {Variant.parse(label).case: Variant.parse(label).seq_len for label in labels if "@" in label}
    by_label = {
        label: [
            row
            for row in rows
            if row.case == Variant.parse(label).case
            and (row.seq_len == Variant.parse(label).seq_len if "@" in label else row.seq_len != lengths.get(row.case))
        ]
        for label in labels
    }
    return costs(by_label)
