"""The decision on a terminal: a table a case, and at most 24 lines of 80 characters that say what to do."""

from __future__ import annotations

import math
import shlex
import textwrap

from instrument.results.contents import Folder
from instrument.terminal import count, printable
from report.statistics import Interval
from report.tables.cell_text import MEMORY_KINDS, UNKNOWN, cell_texts
from report.tables.cells import RECOMMENDED, RUNNER_UP
from report.tables.choice import CaseTable
from report.tables.selection import REFERENCE
from report.text import bounds, gigabytes
from report.verdict.decision import CaseVerdict, Price, Verdict, verdict

WIDTH, HEIGHT = 80, 24
INDENT = 12
MOST_LEFT_OUT = 6


def verdict_text(folder: Folder, price: Price | None = None) -> str:
    """A table a case, the same that stands on the page; what they leave out; then the decision in 24 lines: what to use, what
    is open, what next."""
    decision = verdict(folder, price)
    tables = [line for table in decision.tables for line in (*table_lines(table), "")]
    more = decision.left_out[MOST_LEFT_OUT:]
    shown = [*decision.left_out[:MOST_LEFT_OUT], *([f"and {len(more)} more kinds, in the dossier"] if more else [])]
    left_out = [line for text in shown for line in _fitted(text, "left out    ", 4)] + [""] * bool(shown)
    return "\n".join([*map(printable, tables + left_out), *lines(decision, price)])


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
    tail = [*_fitted(_claims(decision), "", 3), *command_lines(decision.next_command)]
    room = max(1, (HEIGHT - len(head) - len(tail)) // max(1, len(decision.cases)))
    body = [line for task in decision.cases for line in _task(task, room, price)]
    return [printable(line) for line in (*head, *body, *tail)]


def _task(task: CaseVerdict, room: int, price: Price | None) -> list[str]:
    use = _fitted(
        use_text(task, price), f"{task.case:<{INDENT - 1}} ", max(1, (room + 1) // 2) if task.avoid + task.failed else room
    )
    left = room - len(use)
    bad = ". ".join(f"{what} {'; '.join(why)}" for what, why in (("avoid", task.avoid), ("failed", task.failed)) if why)
    return use + (_fitted(bad, " " * INDENT, left) if bad and left else [])


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
        "nothing as good is shown to be faster by 2 %"
        if task.use == REFERENCE
        else f"{speed.value:.2f}x fp32_true {bounds(speed, '.2f')}"
    )
    parts = [
        f"use {task.use}: {against}",
        f"{'at most ' if task.peak_is_bound else ''}{gigabytes(task.peak_bytes)}{MEMORY_KINDS[task.peak_kind]}",
        *([task.quality] if task.quality and task.use != REFERENCE else []),
        cost,
        *([f"runner-up {task.runner_up}"] if task.runner_up else []),
        *([f"without a shown loss {task.lossless}"] if task.lossless else []),
    ]
    return ", ".join(parts) + (f" ({task.reason})" if task.reason else "")


def _claims(decision: Verdict) -> str:
    """The claims by verdict, in a line or two, those not decided with the seeds that would decide them."""
    by_verdict: dict[str, list[str]] = {}
    for name, outcome, seeds in decision.claims:
        by_verdict.setdefault(outcome, []).append(f"{name} (about {count(seeds, 'seed')})" if seeds else name)
    parts = [
        f"{outcome}: {', '.join(by_verdict[outcome])}"
        for outcome in ("supported", "refuted", "not decided")
        if outcome in by_verdict
    ]
    return "claims      " + "; ".join(parts)


def table_lines(table: CaseTable) -> list[str]:
    """A case's table: a line of figures a configuration, then its quality and the reason of its verdict."""
    rows = [cell_texts(cell) for cell in table.cells]
    heads = ("configuration", "state", "speed", "peak memory", "verdict")
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    found = [f"{table.case} ({table.column}), against fp32_true of the same seeds"]
    found.append("  " + "  ".join(f"{head:<{width}}" for head, width in zip(heads, widths, strict=True)).rstrip())
    for row in rows:
        mark = {RECOMMENDED: ">", RUNNER_UP: "+"}.get(row["verdict"], " ")
        found.append(
            f"{mark} " + "  ".join(f"{row[head]:<{width}}" for head, width in zip(heads, widths, strict=True)).rstrip()
        )
        more = [row["quality"], row["difference"], f"headroom {row['headroom']}"]
        for text in (", ".join(part for part in more if not part.endswith(UNKNOWN)), row["why"]):
            found += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return found


def command_lines(command: str) -> list[str]:
    """The next command, continued with backslashes so that it can be copied as it is. Lines break before
    an option, and within one only where it is longer than a line."""
    if not command:
        return []
    found = [f"{'next':<{INDENT - 1}}"]
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
