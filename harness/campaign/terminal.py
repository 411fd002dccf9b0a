"""What a person sees of a campaign, on standard error: plain lines that also read well in a log."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from harness.campaign.pack import Packed
from harness.campaign.plan import CampaignPlan, Cost, Costs
from harness.campaign.stages import Stage
from instrument.terminal import count

CASES_ABREAST = 6
"""Beside the configurations' names within 80 columns."""


def say(line: str) -> None:
    """One line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def echo(line: str) -> None:
    """A stage's own line, where it is one of progress (``  3/7  gpt2_clm ...``): the rest is in its log."""
    if re.match(r"\s*\d+/\d+\s", line):
        print(f"          {line}", file=sys.stderr, flush=True)


def show_machine(machine: Mapping[str, Any], results: Path) -> None:
    """Where, on what, with which data, and what is missing."""
    environment = machine["environment"]
    say(
        f"{environment.get('gpu') or environment['cpu']}, torch {environment['torch_version']}, preset {machine['preset']}, "
        f"data {machine['data']}, weights {machine['weights']}; working in {results}"
    )
    for name, cost in machine["missing"].items():
        say(f"{name} is not installed: {cost}")


def show_plan(plan: CampaignPlan, costs: Costs, configs: Sequence[str], labels: Sequence[str]) -> None:
    """Milliseconds a step, and what is going to be run in which order."""
    say("milliseconds a step (~: taken from the measured one of its kind or estimated; x: died in the calibration)")
    for first in range(0, len(labels), CASES_ABREAST):
        abreast = labels[first : first + CASES_ABREAST]
        heads = [Column("\n".join(label.split("_")), justify="right", no_wrap=True) for label in abreast]
        table = Table("", *heads, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for config in configs:
            table.add_row(config, *(_cost(costs.get((label, config))) for label in abreast))
        Console(stderr=True, highlight=False, markup=False).print(table)
    say(
        f"plan: {count(plan.max_steps, 'step')}, seed{'s' * (len(plan.seeds) > 1)} {' '.join(map(str, plan.seeds))}, "
        f"{count(len(plan.blocks), 'block')} of {count(len(configs), 'configuration')}, "
        f"{_minutes(plan.estimated_s)} of {_minutes(plan.budget_s)} for runs; {plan.why}"
    )
    print(f"{'':>4}{'case':<26}{'seed':>5}{'time':>11}{'in all':>11}  first", file=sys.stderr)
    sum_s: float | None = 0.0
    for number, block in enumerate(plan.blocks, start=1):
        sum_s = None if sum_s is None or block.estimated_s is None else sum_s + block.estimated_s
        times = f"{_minutes(block.estimated_s):>11}{_minutes(sum_s):>11}"
        print(f"{number:>3} {block.case:<26}{block.seed:>5}{times}  {block.configs[0]}", file=sys.stderr)


def show_begin(stage: Stage, at_most_s: float) -> None:
    """A stage is started."""
    say(stage.name if at_most_s == float("inf") else f"{stage.name} (at most {_minutes(at_most_s)})")


def show_end(stage: Stage, state: str, note: str | None, seconds: float) -> None:
    """A stage is over."""
    say(f"{stage.name}: {state} in {seconds:.0f} s" + (f", {note}" if note else ""))


def show_pack(packed: Packed | None, state: str, note: str | None) -> None:
    """The dossier was built, and lies in a folder that may be committed."""
    line = f"dossier: {state}" + (f", {note}" if note else "")
    if packed is not None:
        line += f"; {count(packed.files, 'file')}, {packed.size_bytes / 1e6:.1f} MB, in {packed.folder}"
        line += "".join(f"; left out: {what}" for what in packed.left_out)
    say(line)


def show_left(content: Mapping[str, Any], spent_s: float, logs: Path, done: bool, failed: Sequence[str]) -> None:
    """What was done, what failed, and what the next call does."""
    stages = content["stages"]
    states = [entry["state"] for entry in stages.values()]
    say(
        f"{count(states.count('done'), 'stage')} done, {len(failed)} failed, {states.count('cut')} cut, "
        f"{_minutes(spent_s)} spent in {count(len(content['calls']), 'call')}"
    )
    for name in failed:
        say(f"failed: {name}: {stages[name]['note']} (log: {logs / name}.log)")
    if not done:
        left = [name for name, entry in stages.items() if entry["state"] in ("pending", "running")]
        say("left to do: " + (", ".join(left) or "the plan") + "; the same command resumes")


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "unknown"
    if not cost.step_s:
        return "unsupported"
    return f"{'' if cost.source == 'measured' else '~'}{1e3 * cost.step_s:.0f}{' x' if cost.died else ''}"


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
