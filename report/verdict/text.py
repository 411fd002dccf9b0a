"""The decision on a terminal: at most 24 lines of 80 characters."""

from __future__ import annotations

import math
import shlex
import textwrap

from instrument.results.contents import Folder
from instrument.terminal import count
from report.statistics import Interval
from report.tables.selection import REFERENCE
from report.text import bounds, gigabytes, printable
from report.verdict.decision import CaseVerdict, Price, Verdict, verdict

WIDTH, HEIGHT = 80, 24
INDENT = 12
MEMORY_KINDS = {"allocated": "", "rss": " resident", None: ""}


def verdict_text(folder: Folder, price: Price | None = None) -> str:
    """The decision in 24 lines: per task what to use and what to avoid; what is open; what is next."""
    return "\n".join(lines(verdict(folder, price), price))


def lines(decision: Verdict, price: Price | None = None) -> list[str]:
    """Header, tasks, claims and the next command. Tasks share what room is left between them."""
    head = _fitted(
        " · ".join(
            [
                decision.device,
                count(decision.n_runs, "run"),
                count(decision.n_seeds, "seed"),
                *decision.marks,
                *([count(decision.n_defects, "defect in the files", "defects in the files")] if decision.n_defects else []),
            ]
        ),
        "",
        2,
    )
    tail = [*_fitted(_claims(decision), "", 2), *command_lines(decision.next_command)]
    room = max(1, (HEIGHT - len(head) - len(tail)) // max(1, len(decision.cases)))
    body = [line for task in decision.cases for line in _task(task, room, price)]
    return [printable(line) for line in (*head, *body, *tail)]


def _task(task: CaseVerdict, room: int, price: Price | None) -> list[str]:
    use = _fitted(use_text(task, price), f"{task.case:<{INDENT}}", max(1, (room + 1) // 2) if task.avoid else room)
    left = room - len(use)
    return use + (_fitted("avoid " + "; ".join(task.avoid), " " * INDENT, left) if task.avoid and left else [])


def use_text(task: CaseVerdict, price: Price | None = None) -> str:
    """What to use and why, or why nothing can be said."""
    if task.use is None:
        return f"no recommendation: {task.reason}"
    speed = Interval(task.relative_speed, *(math.nan if v is None else v for v in (task.low, task.high)), task.n)
    cost = f"cost x{task.relative_cost:.2f}"
    if price is not None:
        tokens = task.hours_per_billion_real_tokens
        cost = f"{price.of(task.hours_per_million_samples)} per million samples" + (
            f", {price.of(tokens)} per 10^9 real tokens" if tokens else ""
        )
    against = (
        "nothing faster holds its quality" if task.use == REFERENCE else f"{speed.value:.2f}x fp32_true {bounds(speed, '.2f')}"
    )
    parts = [
        f"use {task.use}: {against}",
        f"{gigabytes(task.peak_bytes)}{MEMORY_KINDS[task.peak_kind]}",
        *([task.quality] if task.quality and task.use != REFERENCE else []),
        cost,
    ]
    return ", ".join(parts) + (f" ({task.reason})" if task.reason else "")


def _claims(decision: Verdict) -> str:
    """The claims by verdict, in a line or two."""
    by_verdict: dict[str, list[str]] = {}
    for name, outcome in decision.claims:
        by_verdict.setdefault(outcome, []).append(name)
    parts = [
        f"{outcome}: {' '.join(by_verdict[outcome])}"
        for outcome in ("supported", "refuted", "not decided")
        if outcome in by_verdict
    ]
    return "claims      " + "; ".join(parts)


def command_lines(command: str) -> list[str]:
    """The next command, continued with backslashes so that it can be copied as it is. Lines break before
    an option, and within one only where it is longer than a line."""
    found = [f"{'next':<{INDENT - 1}}"] if command else []
    for option in _options(shlex.split(command)):
        fits = INDENT + 2 + len(shlex.join(option)) <= WIDTH - 2
        for word in [shlex.join(option)] if fits else map(shlex.quote, option):
            if len(found[-1]) + 1 + len(word) > WIDTH - 2:
                found[-1] += " \\"
                found.append(" " * (INDENT + 1))
            found[-1] += " " + word
    return found


def _options(arguments: list[str]) -> list[list[str]]:
    """The arguments of a command, each option with its values."""
    found: list[list[str]] = [[]]
    for word in arguments:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def _fitted(text: str, start: str, most: int) -> list[str]:
    """Wrapped to the width with a hanging indent, cut after ``most`` lines with an ellipsis."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * INDENT,
        max_lines=most,
        placeholder=" ...",
        break_on_hyphens=False,
    )
