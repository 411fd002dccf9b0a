"""What a campaign runs: the machine and its cases, what a run costs there, and the most steps and seeds that fit its time.

Fewer steps for everything come before a second seed for anything: a case that did not run answers nothing. Up to a fifth of
the preset's steps one seed is drawn out; beyond, three seeds tell more than longer runs, because intervals are over seeds.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS, lookup
from harness.options import CAMPAIGN_SETTINGS
from harness.settings import Request, SettingsError, choose_data, choose_preset
from instrument.results.schemas import RunRecord

ASKED = (*CAMPAIGN_SETTINGS, "cases", "configs", "seeds", "ops", "pairs", "skip", "price_per_hour")
CONTROL = "gpt2_clm@512"
CASE_ORDER = ("gpt2_multi_cls", "gpt2_clm", "roberta_multi_cls", "roberta_mlm", "gpt2_clm@512")
"""BCE and softmax in both architectures first (the 2 x 2 of every hypothesis), then the control that makes their sequence
lengths equal, then every other case."""
LADDER = ((0.03, 1), (0.08, 1), (0.1, 1), (0.15, 1), (0.2, 1), (0.1, 3), (0.15, 3), (0.2, 3), (0.3, 3), (0.5, 3), (1.0, 3))
"""(Share of the preset's steps, seeds), by cost. 0.08 of the full preset is the first with enough timed steps for speeds."""
CALIBRATION_STEPS = 8
CALIBRATED = ("fp32_true", "amp_bf16", "fp16_naive")  # one configuration of each kind
START_S = 4.0  # a run's process until its own clock begins (a fork, the GPU's context): assumed, not measured


def find_machine(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """What `probe` finds out, in a process of its own: the campaign's never touches the GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(probe, asked, estimates=estimates).result()


def probe(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """The device, its slug, the preset's sizes, the case labels and configurations in order. Raises what is wrong with the
    options, the data, the hub or the machine: now, and not in an hour."""
    from bench_cases.data.documents import DataUnavailable
    from bench_cases.data.hub import WAYS_OUT
    from bench_cases.models import build_model
    from harness.estimate import estimate
    from harness.planning import asked_configs, choose_device, plan_run
    from harness.run.execute import load_run_data, model_request
    from instrument.environment import capture, device_slug

    device = choose_device(asked["device"] or "auto")
    preset = PRESETS[choose_preset(asked["preset"] or "auto", device.type)]
    given = Request(**{name: asked[name] for name in CAMPAIGN_SETTINGS if asked[name] is not None and name != "max_steps"})
    configs = [config.id for config in asked_configs(asked["configs"])]
    data = choose_data(asked["data"], preset.id)
    if data.startswith("hub") and find_spec("datasets") is None:
        raise DataUnavailable(f"--data {data} needs the package datasets, which is not installed; {WAYS_OUT}")
    labels = asked["cases"] or [case.id for case in CASES.values() if case.in_default_matrix]
    if not asked["cases"] and preset.id == "full" and asked["seq_len"] is None:
        labels = [*labels, CONTROL]
    labels = sorted(labels, key=lambda label: (*CASE_ORDER, label).index(label))  # most informative first

    def settings_of(label: str, config: str):
        case, seq_len = case_and_length(label)
        sizes = replace(given, seq_len=seq_len or given.seq_len)
        return plan_run(lookup("case", case, CASES), DTYPE_CONFIGS[config], 0, sizes, device)

    drafts = [settings_of(label, configs[0]) for label in labels]
    for draft in (draft for draft in drafts if draft.data.startswith("hub")):  # a hub that does not answer says so now
        documents = load_run_data(draft)
        if draft.weights != "scratch":
            build_model(model_request(draft, documents))
    return {
        **{"device": device.type, "slug": device_slug(device), "preset": preset.id, "preset_steps": preset.max_steps},
        **{"preset_seeds": list(preset.seeds) if len(preset.seeds) > 1 else [0, 1, 2], "labels": labels, "configs": configs},
        **{"data": drafts[0].data, "weights": drafts[0].weights, "environment": capture(device)},
        "estimates": [
            {"label": label, "config": config, "step_s": time_s["step_s"], "fixed_s": START_S + time_s["evaluation_s"]}
            for label, config in (product(labels, representatives(configs)) if estimates else ())
            if (time_s := estimate(settings_of(label, config), Path("results"))["time"]) and time_s["step_s"] is not None
        ],
    }


class Cost(NamedTuple):
    """Seconds of one configuration of a case: ``runs x (fixed_s + steps x step_s)``. Where it died in the calibration, ``runs``
    counts the control configurations that run beside it."""

    fixed_s: float
    step_s: float
    runs: int = 1

    @classmethod
    def of_row(cls, row: RunRecord) -> Cost | None:
        """From one short run; None from one that failed. The first steps compile and allocate: a cost of every run, not of a
        step."""
        timings_s, step_s = row.flags.get("timings_s") or {}, row.step_time_p50_s
        if row.status == "unsupported":
            return cls(1.0, 0.0)
        if "total" not in timings_s or row.status not in ("completed", "diverged"):
            return None
        step_s = timings_s.get("steps", 0.0) / max(1, row.steps_done) if step_s is None else step_s
        controls = len(DTYPE_CONFIGS[row.dtype_config].controls) if row.status == "diverged" else 0
        return cls(START_S + max(0.0, timings_s["total"] - row.steps_done * step_s), step_s, 1 + controls)

    def seconds(self, steps: int) -> float:
        """With ``steps`` in every run."""
        return self.runs * (self.fixed_s + steps * self.step_s)


Costs = dict[tuple[str, str], Cost]  # by (case label, configuration)


def calibrated(rows: Iterable[RunRecord], labels: Sequence[str]) -> Costs:
    """What the rows of the calibration have measured. A case without a length in its label has the rows of no other label."""
    found = {}
    for row in rows:
        label = f"{row.case}@{row.seq_len}" if f"{row.case}@{row.seq_len}" in labels else row.case
        if row.max_steps == CALIBRATION_STEPS and label in labels and (cost := Cost.of_row(row)) is not None:
            found[label, row.dtype_config] = cost
    return found


def costs_of_all(known: Costs, labels: Sequence[str], configs: Sequence[str]) -> Costs:
    """A cost for every case and configuration: its own, or that of the dearest among those that are most like it (its case,
    then its kind). Empty where nothing is known."""
    found = {key: known[key] for key in product(labels, configs) if key in known}
    for label, config in product(labels, configs) if any(cost.step_s for cost in known.values()) else ():
        _, like, cost = max(
            ((other == label, kind(its) == kind(config), its == config, cost.seconds(100)), its, cost)
            for (other, its), cost in known.items()
            if cost.step_s > 0
        )
        found.setdefault((label, config), cost if like == config else cost._replace(runs=1))
    return found


def make_plan(costs: Costs, machine: Mapping[str, Any], asked: Mapping[str, Any], budget_s: float) -> dict[str, Any]:
    """The dearest rung of the ladder that fits into ``budget_s``: ``max_steps`` and ``seeds`` (what was asked for overrules it)
    of all ``cases`` x ``configs``. ``estimated_s`` is None where a cost is missing; what does not fit is for further calls."""
    cells = [costs.get(cell) for cell in product(machine["labels"], machine["configs"])]
    rungs = {}
    for share, n in LADDER:
        steps = asked["max_steps"] or max(1, round(share * machine["preset_steps"]))
        seeds = tuple(machine["preset_seeds"][:n] if asked["seeds"] is None else asked["seeds"])
        rungs[steps, seeds] = None if None in cells else len(seeds) * sum(cost.seconds(steps) for cost in cells)
    fitting = [rung for rung, total_s in rungs.items() if total_s is not None and total_s <= budget_s]
    chosen = fitting[-1] if fitting else next(iter(rungs))
    why = "the preset's own steps and seeds fit" if chosen == list(rungs)[-1] else "the next larger plan would not fit"
    if not fitting:
        why = "not even this much is known to fit: the most informative cases come first, the rest is for further calls"
    plan = {"max_steps": chosen[0], "seeds": list(chosen[1]), "cases": machine["labels"], "configs": machine["configs"]}
    return plan | {"budget_s": budget_s, "estimated_s": rungs[chosen], "fits": bool(fitting), "why": why}


def kind(config: str) -> str:
    """fp32, autocast or pure: what decides a configuration's speed."""
    declared = DTYPE_CONFIGS[config]
    return "fp32" if declared.compute == "fp32" else "autocast" if declared.autocast else "pure"


def representatives(configs: Sequence[str]) -> list[str]:
    """The configurations to calibrate: of every kind that is asked for the one of `CALIBRATED`, or its last."""
    return list({kind(config): config for config in sorted(configs, key=CALIBRATED.__contains__)}.values())


def case_and_length(label: str) -> tuple[str, int | None]:
    """``gpt2_clm@512`` is a case at a sequence length, ``gpt2_clm`` one at the preset's (None). Raises `SettingsError`."""
    case, at, length = label.partition("@")
    if at and not (length.isdecimal() and int(length)):
        raise SettingsError(f"case {label!r}: after @ a number of tokens is needed, such as gpt2_clm@512")
    return case, int(length) if at else None
