"""What the fp32 run predicted for every narrower configuration, beside what happened.

Read from ``predictions/<case>.json`` (``python -m harness predict CASE``) as plain data: what is not of the expected kind is
left out, and a prediction for a run that is no row of this folder does not count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from report.tables.selection import REFERENCE, case_order
from report.tables.table import frame, identity
from report.text import objects

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
        for config in _configs(content):
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


def _configs(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for reference in objects(content.get("references")):
        yield from objects(reference.get("configs"))


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
