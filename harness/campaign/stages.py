"""The stages of a campaign: what each may take, their commands in order, and one of them as a process. Torch-free."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, product
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from harness.campaign.plan import CALIBRATION_STEPS, case_and_length, representatives
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.options import CAMPAIGN_SETTINGS, FIT_SETTINGS, NOT_TIMED, OPS, option_words
from harness.run.signals import Stop
from harness.supervisor.child_process import CommandProcess
from instrument.results.files import make_folder

FOLDER = "campaign"  # in the results folder: what stages print, and results folders for the calibration and the overflow
CALIBRATION = f"{FOLDER}/calibration"


GROUPS = {
    "doctor": (0.05, 60.0, False),
    "check": (0.08, 180.0, False),
    "bench": (0.15, 180.0, False),
    "overhead": (0.10, 60.0, False),
    "calibrate": (0.15, 60.0, True),
    "run": (inf, 0.0, True),
    "overflow": (0.03, 60.0, True),
    "fit": (0.15, 60.0, True),
}
"""What stages of a group may take, and leave: a share of the campaign's planned seconds, but at least so many seconds for each
(a first import and a first compilation take that); and whether one that is asked to stop leaves something to resume from."""
SPEEDS_FIRST_FROM_S, FIT_FROM_S = 1200.0, 3600.0
"""In a shorter campaign the benchmarks of kernels and instruments come after the matrix, which tells more; and no time is kept
free for ``fit``, which gets what the runs leave."""
FIT_CASES = ("gpt2_multi_cls", "gpt2_clm")
OVERFLOW = ("roberta_mlm", "amp_fp16_unscaled", "--lr", "3.0")  # driven into overflow on purpose: for a trace of its replay
POLL_S = 0.1
PACKAGE = __package__.partition("harness")[0]  # before a room's name: nothing in a clone, ``ddbench.`` in the wheel


class Stage(NamedTuple):
    """``group``: its row in `GROUPS`. ``command``: what follows ``python -m``."""

    name: str
    group: str
    command: tuple[str, ...]


def stages_of(
    asked: Mapping[str, Any], machine: Mapping[str, Any], results: Path, total_s: float, plan: Mapping[str, Any] | None = None
) -> list[Stage]:
    """All stages in order; without a ``plan`` those that come before it."""
    labels, configs, there = machine["labels"], machine["configs"], ["--out", str(results)]
    ops = [op for op in OPS if op in (asked["ops"] or OPS)]
    device, pairs = option_words(asked, ["device"]), ["--pairs", str(asked["pairs"])] if asked["pairs"] else []
    price = ["--price-per-hour", str(asked["price_per_hour"])] if asked["price_per_hour"] else []
    at_most_s = 0.7 * max(GROUPS["overhead"][1], GROUPS["overhead"][0] * total_s)  # the rest is for building its arms

    def matrix(seed: int, steps: int, labels: Sequence[str], configs: Sequence[str], *more: str) -> tuple[str, ...]:
        cases, lengths = zip(*map(case_and_length, labels), strict=True)
        sizes = option_words({**asked, "seq_len": lengths[0] or asked["seq_len"], "max_steps": steps}, CAMPAIGN_SETTINGS)
        return ("harness", "matrix", "--cases", *cases, "--configs", *configs, "--seeds", str(seed), *sizes, *more)

    timed = [op for op in ops if op not in NOT_TIMED]
    bench = ("kernels", "bench", "--op", *timed, *device, *pairs, "--out", str(results / "kernels.json"))
    speeds = [Stage("bench", "bench", bench)] if timed else []
    speeds.append(
        Stage("overhead", "overhead", ("harness", "bench", "overhead", *pairs, "--at-most", f"{at_most_s:.0f}", *there))
    )
    stages = [
        Stage("doctor", "doctor", ("harness", "doctor", "--measure", *there, "--json")),
        Stage("check", "check", ("kernels", "check", "--op", *ops, *device, "--out", str(results / "kernel_check.json"))),
        *(speeds if total_s >= SPEEDS_FIRST_FROM_S else []),
    ]
    for seq_len in dict.fromkeys(case_and_length(label)[1] for label in labels):
        cases, few = [label for label in labels if case_and_length(label)[1] == seq_len], representatives(configs)
        command = matrix(0, CALIBRATION_STEPS, cases, few, "--no-follow-up", "--out", str(results / CALIBRATION))
        stages.append(Stage(f"calibrate@{seq_len}" if seq_len else "calibrate", "calibrate", command))
    if plan is not None:
        # The first case alone, since the first dossier follows it; then neighbours of one seed and length in one matrix.
        cells = list(enumerate(product(plan["seeds"], labels)))
        for _, group in groupby(cells, lambda cell: (cell[0] == 0, cell[1][0], case_and_length(cell[1][1])[1])):
            (turn, (seed, first)), *_ = block = list(group)
            turn %= len(configs)  # so that a warming machine favours no configuration
            command = matrix(seed, plan["max_steps"], [c for _, (_, c) in block], configs[turn:] + configs[:turn], *there)
            stages.append(Stage(f"run-{first}-s{seed}", "run", command))
        forty_steps = option_words({**asked, "max_steps": 40}, CAMPAIGN_SETTINGS)
        overflow = ("harness", "case", *OVERFLOW, *forty_steps, "--out", str(results / FOLDER / "overflow"))
        stages += [Stage("overflow", "overflow", overflow)] if OVERFLOW[0] in labels else []
        stages += speeds if total_s < SPEEDS_FIRST_FROM_S else []
        fit = ("--configs", *configs, *option_words(asked, FIT_SETTINGS), *price, *there)
        stages += [Stage(f"fit-{case}", "fit", ("harness", "fit", case, *fit)) for case in FIT_CASES if case in labels]
    return [stage for stage in stages if stage.group not in (asked["skip"] or ())]


def outcome(exit_code: int, cut: str | None, *, resumes: bool) -> tuple[str, str | None]:
    """(state, note) of a stage from how its process ended; ``cut`` as `run_process` returns it."""
    if cut == "limit":
        return "cut", "its share of the time was over; what it had written by then is kept"
    if exit_code == OK and (cut is None or resumes):
        return "done", None
    if cut is not None or exit_code == INTERRUPTED:
        return "pending", f"stopped by {cut or 'somebody else'}"
    if exit_code == RUN_FAILED and resumes:
        return "done", "some run ended oom, error or hung; their rows say why"
    return "failed", f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def run_process(
    command: Sequence[str], files: Sequence[Path], limits_s: Mapping[str, float], grace_s: float, stop: Stop, started: Callable
) -> tuple[int, str | None]:
    """Run ``python -m command`` with its standard output in the first of ``files`` and the rest in the second (added to).

    It is asked to end at the first of ``limits_s`` or when ``stop`` is requested, and killed with all its processes ``grace_s``
    later. Calls ``started(pid)``. Returns its exit code, and None or what cut it: the name of a limit or of a signal."""
    began_s, cut, limit = time.monotonic(), None, min(limits_s, key=limits_s.__getitem__)
    python = [sys.executable, "-u", "-m", PACKAGE + command[0], *command[1:]]
    make_folder(files[1].parent)
    with files[0].open("wb") as out, files[1].open("ab") as log, CommandProcess(python, stdout=out, stderr=log) as child:
        started(child.pid)
        while child.running():
            if cut is None and (stop.requested or time.monotonic() - began_s > limits_s[limit]):
                cut = stop.requested or limit
                child.monitor.end(grace_s)
            child.monitor.look()
            time.sleep(POLL_S)
    if not files[0].stat().st_size:  # most print nothing
        files[0].unlink()
    return child.exit_code(), cut
