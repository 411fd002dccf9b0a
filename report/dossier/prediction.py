"""What the fp32 run predicted for every narrower configuration, beside what happened, and both as text.

Read from ``predictions/<case>.json`` (``python -m harness predict CASE``) as plain data: what is not of the expected kind is
left out, and a prediction for a run that is no row of this folder does not count."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.terminal import count
from report.dossier.rows import ABSENT
from report.harness_commands import case_arguments
from report.tables.selection import REFERENCE, case_order, series_order
from report.tables.table import frame, identity
from report.text import clean, objects

VERDICTS = (
    "predicted and happened",
    "predicted and did not happen",
    "happened and was not predicted",
    "predicted and not reached",
    "neither predicted nor happened",
)
HIT, FALSE_ALARM, MISSED, NOT_REACHED, NEITHER = VERDICTS
KINDS = {
    "overflow_forward": "forward overflow",
    "overflow_backward": "backward overflow",
    "norm_overflow": "norm overflow",
    "division_by_zero": "division by zero",
    "scaler_skip": "scaler skip",
    "states_flush": "states flushed",
    "gradient_flush": "gradients flushed",
    "other": "something else",
}
"""Kind of hazard, as `instrument.prediction` names it -> text."""
SIGNS = {HIT: "✓", FALSE_ALARM: "!", MISSED: "✗", NOT_REACHED: "·", NEITHER: "–"}
END_HEADS = ("case", "configuration", "seed", "predicted", "happened", "verdict")
MOST_ROWS = 40

OUTCOMES = ("case", "dtype_config", "seed", "run_id", "kind", "verdict", "step")
ENDS = tuple(
    "case dtype_config seed run_id predicted predicted_step predicted_module happened happened_step happened_module".split()
)


@dataclass(frozen=True)
class Predicted:
    """``outcomes``: a row a run and kind of hazard, with its verdict and the step for which it was predicted;
    ``ends``: a row a run that ended or was predicted to; ``missing``: cases that could be predicted and were not."""

    outcomes: pd.DataFrame
    ends: pd.DataFrame
    missing: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Outcomes by verdict, every verdict named."""
        found = self.outcomes["verdict"].value_counts()
        return {verdict: int(found.get(verdict, 0)) for verdict in VERDICTS}


def predicted(folder: Folder) -> Predicted:
    """Every comparison that the folder's predictions hold."""
    outcomes, ends, missing = [], [], []
    for case in case_order({run.case for run in folder.runs}):
        content = folder.predictions(case)
        if content is None:
            if _could_be_predicted(folder, case):
                missing.append(case)
            continue
        seen: set[str] = set()
        references = objects(content.get("references"))
        for config in [config for reference in references for config in objects(reference.get("configs"))]:
            run = folder.by_id.get(config["run_id"]) if isinstance(config.get("run_id"), str) else None
            if run is None or run.case != case or run.run_id in seen:
                continue
            seen.add(run.run_id)
            who = identity(run)
            outcomes += [who | row for row in _outcomes(config)]
            if (end := _end(config)) is not None:
                ends.append(who | end)
    return Predicted(frame(outcomes, OUTCOMES), frame(ends, ENDS), tuple(missing))


def _could_be_predicted(folder: Folder, case: str) -> bool:
    """Whether an fp32 run with measured modules stands beside a narrower run."""
    runs = [run for run in folder.runs if run.case == case]
    narrow = any(getattr(DTYPE_CONFIGS.get(run.dtype_config), "compute", "fp32") != "fp32" for run in runs)
    return narrow and any(run.dtype_config == REFERENCE and run.steps_done for run in runs)


def _outcomes(config: dict[str, Any]) -> list[dict[str, Any]]:
    steps: dict[str, int] = {}
    for hazard in objects(config.get("hazards")):
        if isinstance(hazard.get("kind"), str) and (step := _step(hazard.get("step"))) is not None:
            steps[hazard["kind"]] = min(step, steps.get(hazard["kind"], step))
    return [
        {"kind": row["kind"], "verdict": row["verdict"], "step": steps.get(row["kind"])}
        for row in objects(config.get("outcomes"))
        if row.get("verdict") in VERDICTS and isinstance(row.get("kind"), str)
    ]


def _end(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the run was predicted to end of, and what it ended of; None when it was compared with nothing, or neither."""
    end = config.get("ends") if isinstance(config.get("ends"), dict) else {}
    happened = config.get("happened") if isinstance(config.get("happened"), str) else None
    if not config.get("outcomes") or not (end.get("kind") or happened):
        return None
    return {
        "predicted": end.get("kind"),
        "predicted_step": _step(end.get("step")),
        "predicted_module": end.get("module"),
        "happened": happened,
        "happened_step": _step(config.get("ended_at")),
        "happened_module": config.get("happened_in"),
    }


def _step(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def prediction_text(found: Predicted, folder) -> dict[str, Any]:
    """The section's tables. ``rows`` empty: nothing was compared, and ``missing`` says why."""
    cases = case_order(found.outcomes["case"].unique())
    return {
        "heads": ("configuration", *(clean(case, 40) for case in cases)),
        "rows": [
            [clean(config, 40), *(_cell(rows[rows["case"] == case]) for case in cases)]
            for config in series_order(found.outcomes["dtype_config"].unique())
            for rows in [found.outcomes[found.outcomes["dtype_config"] == config]]
        ],
        "legend": "; ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items()),
        "sentence": _sentence(found),
        "end_heads": END_HEADS,
        "ends": [_end_text(row) for row in found.ends.head(MOST_ROWS).to_dict("records")],
        "further": max(0, len(found.ends) - MOST_ROWS),
        "missing": _missing(found, folder),
    }


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


def _end_text(row: dict[str, Any]) -> list[str]:
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
