"""Predicted against observed as text: configuration x case, and every run that ended or was to end."""

from __future__ import annotations

import shlex
from typing import Any

import pandas as pd

from instrument.terminal import count
from report.dossier.rows import ABSENT
from report.harness_commands import case_arguments
from report.tables.predicted import FALSE_ALARM, HIT, KINDS, MISSED, NEITHER, NOT_REACHED, Predicted
from report.tables.selection import case_order, series_order
from report.text import clean

SIGNS = {HIT: "✓", FALSE_ALARM: "!", MISSED: "✗", NOT_REACHED: "·", NEITHER: "–"}
END_HEADS = ("case", "configuration", "seed", "predicted", "happened", "verdict")
MOST_ROWS = 40


def prediction_text(found: Predicted, folder) -> dict[str, Any]:
    """The section's tables. ``rows`` empty: nothing was compared, and ``missing`` says why."""
    cases = case_order(found.outcomes["case"].unique())
    ends = [_end(row) for row in found.ends.head(MOST_ROWS).to_dict("records")]
    return {
        "heads": ("configuration", *(clean(case, 40) for case in cases)),
        "rows": _matrix(found.outcomes, cases),
        "legend": "; ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items()),
        "sentence": _sentence(found),
        "end_heads": END_HEADS,
        "ends": ends,
        "further": max(0, len(found.ends) - MOST_ROWS),
        "missing": _missing(found, folder),
    }


def _matrix(outcomes: pd.DataFrame, cases: list[str]) -> list[list[str]]:
    rows = []
    for config in series_order(outcomes["dtype_config"].unique()):
        of_config = outcomes[outcomes["dtype_config"] == config]
        rows.append([clean(config, 40), *(_cell(of_config[of_config["case"] == case]) for case in cases)])
    return rows


def _cell(outcomes: pd.DataFrame) -> str:
    """Hazards that were predicted or happened, with the step of the prediction and in how many seeds; or that
    there was none."""
    if outcomes.empty:
        return ABSENT + " not run"
    hazards = outcomes[outcomes["verdict"] != NEITHER]
    if hazards.empty:
        return f"{SIGNS[NEITHER]} nothing"
    n, parts = outcomes["run_id"].nunique(), []
    for (kind, verdict), rows in hazards.groupby(["kind", "verdict"], sort=False):
        seeds = f" {len(rows)}/{n}" if n > 1 else ""
        at = f" @ {int(rows['step'].min())}" if rows["step"].notna().any() else ""
        parts.append(f"{SIGNS[verdict]} {KINDS.get(kind, clean(kind, 30))}{at}{seeds}")
    return "; ".join(parts)


def _sentence(found: Predicted) -> str:
    """How often the fp32 run was right, from the counts."""
    counts = found.counts
    runs = found.outcomes["run_id"].nunique()
    return (
        f"From the fp32 run alone, for {count(runs, 'narrower run')} of its case and seed: {count(counts[HIT], 'hazard')} "
        f"predicted and seen, {counts[FALSE_ALARM]} predicted and not seen, {counts[MISSED]} seen and not predicted, "
        f"{counts[NOT_REACHED]} predicted beyond the run's end, {counts[NEITHER]} neither. @: the step of the prediction."
    )


def _end(row: dict[str, Any]) -> list[str]:
    predicted, happened = (_happening(row, key) for key in ("predicted", "happened"))
    same = row["predicted"] == row["happened"]
    verdict = HIT if same else NEITHER
    if not same:
        verdict = FALSE_ALARM if not row["happened"] else MISSED if not row["predicted"] else "another end than predicted"
    return [
        clean(row["case"], 40),
        clean(row["dtype_config"], 40),
        clean(row["seed"], 12),
        predicted,
        happened,
        f"{SIGNS.get(verdict, '✗')} {verdict}",
    ]


def _happening(row: dict[str, Any], key: str) -> str:
    kind, step, module = row[key], row[f"{key}_step"], row[f"{key}_module"]
    if not isinstance(kind, str):
        return "no end"
    at = f" @ {int(step)}" if pd.notna(step) else ""
    return KINDS.get(kind, clean(kind, 30)) + at + (f", {clean(module, 70)}" if isinstance(module, str) and module else "")


def _command(case: str, folder) -> str:
    """How to predict for a case; nothing where ``predict`` has no name for it."""
    arguments = next((found for run in folder.runs if run.case == case and (found := case_arguments(run))), [])
    return (
        f": python -m harness predict {shlex.quote(arguments[0])} --out {shlex.quote(clean(folder.path, 200))}"
        if len(arguments) == 1
        else ""
    )


def _missing(found: Predicted, folder) -> list[str]:
    """The command that would fill what is missing; of data that this harness did not make there is none."""
    if found.missing and {"IMPORTED", "SIMULATED"} & set(folder.marks):
        return ["Not measured: these runs come without the magnitudes of their modules."]
    lines = [f"{clean(case, 60)}: not measured{_command(case, folder)}" for case in found.missing]
    return lines or ([] if len(found.outcomes) else ["Not measured: no run can be compared with an fp32 run of its case."])
