"""What a person sees of a campaign, on standard error: plain lines that also read well in a log."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from harness.campaign.book import Book
from harness.campaign.pack import Packed
from harness.campaign.plan import Cost, Plan
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


def show_plan(plan: Plan, costs: Mapping[tuple[str, str], Cost], machine: Mapping[str, Any]) -> None:
    """Seconds a step, and what is going to be run in which order."""
    configs = machine["configs"]
    say("milliseconds a step (~: taken from the measured one of its kind or estimated; x: died in the calibration)")
    for first in range(0, len(machine["labels"]), CASES_ABREAST):
        labels = machine["labels"][first : first + CASES_ABREAST]
        table = Table(
            "",
            *(Column("\n".join(label.split("_")), justify="right", no_wrap=True) for label in labels),
            box=None,
            padding=(0, 2, 0, 0),
            pad_edge=False,
        )
        for config in configs:
            table.add_row(config, *(_cost(costs.get((label, config))) for label in labels))
        Console(stderr=True, highlight=False, markup=False).print(table)
    seeds = ("seed " if len(plan.seeds) == 1 else "seeds ") + " ".join(map(str, plan.seeds))
    say(
        f"plan: {count(plan.max_steps, 'step')}, {seeds}, {count(len(plan.blocks), 'block')} of "
        f"{count(len(configs), 'configuration')}, "
        f"{_minutes(plan.estimated_s)} of {_minutes(plan.budget_s)} for runs; {plan.why}"
    )
    print(f"{'':>4}{'case':<26}{'seed':>5}{'time':>11}{'in all':>11}  first", file=sys.stderr)
    sum_s: float | None = 0.0
    for number, block in enumerate(plan.blocks, start=1):
        sum_s = None if sum_s is None or block.estimated_s is None else sum_s + block.estimated_s
        print(
            f"{number:>3} {block.case:<26}{block.seed:>5}{_minutes(block.estimated_s):>11}{_minutes(sum_s):>11}  "
            f"{block.configs[0]}",
            file=sys.stderr,
        )


def begins(stage: Stage, at_most_s: float) -> None:
    """A stage is started."""
    limit = "" if at_most_s == float("inf") else f" (at most {_minutes(at_most_s)})"
    say(f"{stage.name}{limit}")


def ended(stage: Stage, state: str, note: str | None, seconds: float) -> None:
    """A stage is over."""
    say(f"{stage.name}: {state} in {seconds:.0f} s" + (f", {note}" if note else ""))


def packed(result: Packed | None, state: str, note: str | None) -> None:
    """The dossier was built, and lies in a folder that may be committed."""
    words = f"dossier: {state}" + (f", {note}" if note else "")
    if result is not None:
        words += f"; {count(result.files, 'file')}, {result.size_bytes / 1e6:.1f} MB, in {result.folder}"
        words += "".join(f"; left out: {what}" for what in result.left_out)
    say(words)


def last_words(book: Book, done: bool, failed: list[str]) -> None:
    """What is left, and what the next call does."""
    stages = book.content["stages"]
    left = [name for name, entry in stages.items() if entry["state"] in ("pending", "running")]
    say(
        f"{count(sum(entry['state'] == 'done' for entry in stages.values()), 'stage')} done, {len(failed)} failed, "
        f"{sum(entry['state'] == 'cut' for entry in stages.values())} cut, {_minutes(book.spent_s)} spent in "
        f"{count(len(book.content['calls']), 'call')}"
    )
    for name in failed:
        say(f"failed: {name}: {stages[name]['note']} (log: {book.path.parent / 'campaign' / 'logs' / name}.log)")
    if not done:
        say("left to do: " + (", ".join(left) or "the plan") + "; the same command goes on")


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
