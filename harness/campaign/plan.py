"""What a campaign runs: the machine and its cases, what a run costs there, the most steps and seeds that fit its time, and its
stages in order. Torch-free but for `probe`, which has a process of its own.

The pilot comes first: one seed of every case and configuration, with the fewest steps that give a speed. Its runs stand in the
results as they are, and what they took plans the rest: three seeds of as many steps, then of more.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby, product
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS, lookup
from harness.campaign.pack import FOLDER
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.matrix.spending import START_UP_S, run_seconds
from harness.options import CAMPAIGN_SETTINGS, FIT_SETTINGS, NOT_TIMED, OPS, option_words
from harness.settings import Request, SettingsError, choose_data, choose_preset
from instrument.results.schemas import RunRecord

ASKED = (*CAMPAIGN_SETTINGS, "cases", "configs", "seeds", "ops", "pairs", "skip", "price_per_hour")
CONTROL = "gpt2_clm@512"
CASE_ORDER = ("gpt2_multi_cls", "gpt2_clm", "roberta_multi_cls", "roberta_mlm", "gpt2_clm@512")
"""BCE and softmax in both architectures first (the 2 x 2 of every hypothesis), then the control that makes their sequence
lengths equal, then every other case."""
PILOT_STEPS = 80  # the full preset leaves 20 untimed, and the report takes a speed from 50 on
LADDER = ((0.0, 1), (0.0, 3), (0.2, 3), (0.3, 3), (0.5, 3), (1.0, 3))
"""(Share of the preset's steps, seeds), by cost; never fewer steps than the pilot's. Of a case the report shows the variant
with the most runs, which is the pilot until there are more."""

Costs = dict[tuple[str, str], tuple[float, float]]  # by label, configuration: seconds of a run whatever its steps, of a step


def find_machine(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """What `probe` finds out, in a process of its own: this one never touches the GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(probe, asked, estimates=estimates).result()


def probe(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """The device, its slug, the preset's sizes, the case labels and configurations in order, how many runs are executed at a
    time. Raises what is wrong with the options, the data, the hub or the machine: now, and not in an hour."""
    from bench_cases.data.documents import DataUnavailable
    from bench_cases.data.hub import WAYS_OUT
    from bench_cases.models import build_model
    from harness.estimate import estimate
    from harness.matrix.command import local_jobs
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
        sizes = replace(given, seq_len=length_of(label) or given.seq_len)
        return plan_run(lookup("case", label.partition("@")[0], CASES), DTYPE_CONFIGS[config], 0, sizes, device)

    drafts = [settings_of(label, configs[0]) for label in labels]
    for draft in (draft for draft in drafts if draft.data.startswith("hub")):  # a hub that does not answer says so now
        documents = load_run_data(draft)
        if draft.weights != "scratch":
            build_model(model_request(draft, documents))
    speed = {config: (DTYPE_CONFIGS[config].compute, DTYPE_CONFIGS[config].autocast) for config in configs}
    alike = {(label, speed[config]): (label, config) for label, config in product(labels, configs)} if estimates else {}
    times = {key: estimate(settings_of(*cell), Path("results"))["time"] for key, cell in alike.items()}  # half a second each
    return {
        **{"device": device.type, "slug": device_slug(device), "preset": preset.id, "preset_steps": preset.max_steps},
        **{"preset_seeds": list(preset.seeds) if len(preset.seeds) > 1 else [0, 1, 2], "labels": labels, "configs": configs},
        **{"data": drafts[0].data, "weights": drafts[0].weights, "environment": capture(device)},
        "jobs": local_jobs(drafts, device),
        "estimates": [
            (label, config, START_UP_S + time_s["evaluation_s"], time_s["step_s"])
            for label, config in product(labels, configs)
            if (time_s := times.get((label, speed[config]))) and time_s["step_s"] is not None
        ],
    }


def pilot_of(machine: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """``max_steps`` and ``seeds`` of the runs that come before there is a plan."""
    steps = asked["max_steps"] or min(PILOT_STEPS, machine["preset_steps"])
    return {"max_steps": steps, "seeds": (asked["seeds"] or machine["preset_seeds"])[:1]}


def costs_of(rows: Iterable[RunRecord], machine: Mapping[str, Any], asked: Mapping[str, Any]) -> Costs:
    """What the pilot's runs took, a diverged one with its controls. A case without a length in its label has the rows of no
    other label. The first steps compile and allocate: a cost of every run, not of a step."""
    pilot, found = pilot_of(machine, asked), {}
    for row in rows:
        label = f"{row.case}@{row.seq_len}" if f"{row.case}@{row.seq_len}" in machine["labels"] else row.case
        cell, same = (label, row.dtype_config), (row.max_steps, [row.seed]) == (pilot["max_steps"], pilot["seeds"])
        if same and cell in product(machine["labels"], machine["configs"]) and row.status in ("completed", "diverged"):
            runs = 1 + (len(DTYPE_CONFIGS[row.dtype_config].controls) if row.status == "diverged" else 0)
            mean_s = row.flags.get("timings_s", {}).get("steps", 0.0) / max(1, row.steps_done)
            step_s = mean_s if row.step_time_p50_s is None else row.step_time_p50_s
            found[cell] = runs * (START_UP_S + max(0.0, run_seconds(row) - row.steps_done * step_s)), runs * step_s
    return found


def make_plan(costs: Costs, machine: Mapping[str, Any], asked: Mapping[str, Any], budget_s: float) -> dict[str, Any]:
    """The dearest rung of the ladder that fits, with the pilot, into ``budget_s``: ``max_steps`` and ``seeds`` (what was asked
    for overrules it) of all cases x configurations. A cell that failed costs nothing; ``estimated_s`` is None where no cost is
    known. What does not fit is for further calls."""
    pilot, rungs = pilot_of(machine, asked), {}

    def seconds(steps: int) -> float:
        return sum(fixed_s + steps * step_s for fixed_s, step_s in costs.values()) / machine["jobs"]

    for share, n in LADDER:
        steps = asked["max_steps"] or max(pilot["max_steps"], round(share * machine["preset_steps"]))
        seeds = tuple(asked["seeds"] or machine["preset_seeds"][:n])
        pilot_s = seconds(pilot["max_steps"]) if steps != pilot["max_steps"] else 0.0
        rungs[steps, seeds] = len(seeds) * seconds(steps) + pilot_s if costs else None
    fitting = [rung for rung, total_s in rungs.items() if total_s is not None and total_s <= budget_s]
    steps, seeds = chosen = fitting[-1] if fitting else next(iter(rungs))
    why = "the preset's own steps and seeds fit" if chosen == list(rungs)[-1] else "the next larger plan would not fit"
    if not fitting:
        why = "not even this much is known to fit: the most informative cases come first, the rest is for further calls"
    plan = {"max_steps": steps, "seeds": list(seeds), "budget_s": budget_s, "estimated_s": rungs[chosen]}
    return plan | {"fits": bool(fitting), "why": why}


def length_of(label: str) -> int | None:
    """``gpt2_clm@512`` is a case at a sequence length, ``gpt2_clm`` one at the preset's (None). Raises `SettingsError`."""
    _, at, length = label.partition("@")
    if at and not (length.isdecimal() and int(length)):
        raise SettingsError(f"case {label!r}: after @ a number of tokens is needed, such as gpt2_clm@512")
    return int(length) if at else None


GROUPS = {
    "doctor": (0.05, 60.0, False),
    "bench": (0.05, 90.0, True),
    "run": (inf, 0.0, True),
    "check": (0.08, 120.0, False),
    "overhead": (0.10, 60.0, False),
    "overflow": (0.03, 60.0, True),
    "fit": (0.15, 60.0, True),
    "dossier": (0.0, 600.0, False),
}
"""What stages of a group may take in one turn: a share of the campaign's planned seconds, but at least so many seconds for each
(a first import and a first compilation take that); and whether one that is asked to stop leaves something to resume from."""
FIT_FROM_S = 3600.0  # a shorter campaign keeps no time free for ``fit``, which gets what the runs leave
CPU_PAIRS = "6"  # of the kernels' benchmark on a CPU: the fewest with an interval, since nobody chooses a kernel by them
FIT_CASES = ("gpt2_multi_cls", "gpt2_clm")
OVERFLOW = ("roberta_mlm", "amp_fp16_unscaled", "--lr", "3.0")  # driven into overflow on purpose: for a trace of its replay
PACKAGE = __package__.partition("harness")[0]  # before a room's name: nothing in a clone, ``ddbench.`` in the wheel


class Stage(NamedTuple):
    """``group``: its row in `GROUPS`. ``command``: what follows ``python -m``, in the wheel below `PACKAGE`."""

    name: str
    group: str
    command: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        """The words that start its process."""
        return [sys.executable, "-u", "-m", PACKAGE + self.command[0], *self.command[1:]]


def stages_of(
    asked: Mapping[str, Any], machine: Mapping[str, Any], results: Path, total_s: float, plan: Mapping[str, Any] | None = None
) -> list[Stage]:
    """All stages in order; without a ``plan`` those that come before it. On a GPU the kernels' headline comes first, with
    which their benchmark begins; the first case is alone, since the first dossier follows it."""
    labels, configs, there = machine["labels"], machine["configs"], ["--out", str(results)]
    ops, pilot = [op for op in OPS if op in (asked["ops"] or OPS)], pilot_of(machine, asked)
    timed = [op for op in ops if op not in NOT_TIMED]
    device, pairs = option_words(asked, ["device"]), ["--pairs", str(asked["pairs"])] if asked["pairs"] else []
    price = ["--price-per-hour", str(asked["price_per_hour"])] if asked["price_per_hour"] else []
    at_most_s = 0.7 * max(GROUPS["overhead"][1], GROUPS["overhead"][0] * total_s)  # the rest is for building its arms

    def runs(plan: Mapping[str, Any]) -> list[Stage]:
        """For each seed a matrix of the first case, and one of all neighbours of a length."""
        blocks, found = [labels[:1], *(list(same) for _, same in groupby(labels[1:], length_of))], []
        for turn, (seed, block) in enumerate(product(plan["seeds"], blocks)):
            turn %= len(configs)  # so that a warming machine favours no configuration
            cases = [label.partition("@")[0] for label in block]
            sizes = {**asked, "seq_len": length_of(block[0]) or asked["seq_len"], "max_steps": plan["max_steps"]}
            command = ("harness", "matrix", "--cases", *cases, "--configs", *configs[turn:], *configs[:turn])
            command += ("--seeds", str(seed), *option_words(sizes, CAMPAIGN_SETTINGS), *there)
            steps = "" if plan["max_steps"] == pilot["max_steps"] else f"-{plan['max_steps']}-steps"
            found.append(Stage(f"run-{block[0]}-s{seed}{steps}", "run", command))
        return found

    doctor = Stage("doctor", "doctor", ("harness", "doctor", "--measure", *there, "--json"))
    bench_pairs = pairs or (["--pairs", CPU_PAIRS] if machine["device"] == "cpu" else [])
    bench = ("kernels", "bench", "--op", *timed, *device, *bench_pairs, "--out", str(results / "kernels.json"))
    jobs = str(min(len(ops), os.cpu_count() or 1) if machine["device"] == "cuda" else 1)
    check = ("kernels", "check", "--op", *ops, *device, "--jobs", jobs, "--out", str(results / "kernel_check.json"))
    overhead = ("harness", "bench", "overhead", *pairs, "--at-most", f"{at_most_s:.0f}", *there)
    kernels = [Stage("bench", "bench", bench)] if timed else []
    first_run, *more_runs = runs(pilot)
    stages = [doctor, *(kernels if machine["device"] == "cuda" else []), first_run, Stage("check", "check", check), *more_runs]
    stages.append(Stage("overhead", "overhead", overhead))
    if plan is not None:
        stages += [stage for stage in runs(plan) if stage not in stages]
        forty_steps = option_words({**asked, "max_steps": 40}, CAMPAIGN_SETTINGS)
        overflow = ("harness", "case", *OVERFLOW, *forty_steps, "--out", str(results / FOLDER / "overflow"))
        stages += [Stage("overflow", "overflow", overflow)] if OVERFLOW[0] in labels else []
        stages += [stage for stage in kernels if stage not in stages]
        fit = ("--configs", *configs, *option_words(asked, FIT_SETTINGS), *price, *there)
        stages += [Stage(f"fit-{case}", "fit", ("harness", "fit", case, *fit)) for case in FIT_CASES if case in labels]
    return [stage for stage in stages if stage.group not in (asked["skip"] or ())]


def outcome(exit_code: int, cut: str | None, *, resumes: bool) -> tuple[str, str | None]:
    """(state, note) of a stage from how its process ended; ``cut`` as `run_command` returns it."""
    if cut == "limit":
        return "cut", "its share of the time was over; it resumes" if resumes else "its share of the time was over"
    if exit_code == OK and (cut is None or resumes):
        return "done", None
    if cut is not None or exit_code == INTERRUPTED:
        return "pending", f"stopped by {cut or 'somebody else'}"
    if exit_code == RUN_FAILED and resumes:
        return "done", "some run ended oom, error or hung; their rows say why"
    return "failed", f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
