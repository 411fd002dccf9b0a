"""The stages of a campaign: what each may take, their commands in order, and how one ended. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import groupby, product
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from harness.campaign.plan import length_of, pilot_of
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.options import CAMPAIGN_SETTINGS, FIT_SETTINGS, NOT_TIMED, OPS, option_words

FOLDER = "campaign"  # in the results folder: what stages print, and a results folder for the overflow
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
