"""``python -m harness inspect RUN --try CHANGE ...``: runs a failed run's steps again with one thing changed, and prints
which changes it survives.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from harness.exit_codes import OK
from harness.forensics.changes import refuse_unknown
from harness.forensics.counterfactual import Counterfactual, try_changes
from harness.settings import SettingsError
from instrument.results.forensics import Remedy
from instrument.results.layout import locate
from instrument.terminal import count

CAUSES = {
    "overflow": "overflow",
    "underflow_then_divide": "underflow, then division by it",
    "invalid": "an invalid operation",
    "from_input": "a value that came in from outside the step",
}


def try_command(options: argparse.Namespace) -> int:
    """Try the changes, print a table; ``--json`` prints the result as one object on standard output."""
    if options.repro is not None:
        raise SettingsError("--try and --repro are two commands; give one of them")
    if options.steps is not None and options.steps < 1:
        raise SettingsError(f"--steps is {options.steps}; it must be at least 1")
    run = locate(options.run, options.out)
    refuse_unknown(options.changes)
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        tried = try_changes(run.path, options.changes, options.steps, lambda what: status.update(f"replaying: {what}"))
    if options.json:
        row = msgspec.to_builtins(tried) | {"confirmed_by": tried.confirmed_by}
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        return OK
    for line in heading(tried):
        console.print(line)
    console.print(table(tried.remedies))
    for line in notes(tried):
        console.print(Padding(line, (0, 0, 0, 2)))
    console.print(verdict(tried))
    return OK


def heading(tried: Counterfactual) -> list[str]:
    """What failed, from where it was replayed, and whether the control failed again."""
    again = (
        f"[green]fails again at step {tried.control_failed_at}[/]"
        if tried.reproduced
        else (
            "[yellow]does not fail again[/]"
            if tried.control_failed_at is None
            else f"[yellow]fails in another way, at step {tried.control_failed_at}[/]"
        )
    )
    return [
        f"[bold]{escape(tried.run_id)}[/]",
        escape(tried.sentence),
        f"from the snapshot after step {tried.snapshot_step} up to step {tried.last_step}; unchanged, it {again}",
        *(f"[yellow]another machine: {escape(warning)}[/]" for warning in tried.warnings),
    ]


def table(remedies: tuple[Remedy, ...]) -> Table:
    """A row a change."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column("change", overflow="fold")
    drawn.add_column("outcome", no_wrap=True)
    drawn.add_column("step time", justify="right", no_wrap=True)
    drawn.add_column("memory", justify="right", no_wrap=True)
    for r in remedies:
        drawn.add_row(escape(r.change), outcome(r), _times(r.step_time_ratio), _times(r.bytes_ratio))
    return drawn


def outcome(remedy: Remedy) -> str:
    """Survives or not."""
    if remedy.survives is None:
        return "[dim]not tried[/]"
    if remedy.survives:
        return f"[green]survives {count(remedy.steps, 'step')}[/]"
    return f"[red]fails at step {remedy.failed_at}[/]" if remedy.failed_at is not None else "[red]trains nothing[/]"


def notes(tried: Counterfactual) -> list[str]:
    """What the table has no room for."""
    lines = [f"{escape(r.change)}: [dim]{escape(r.why)}[/]" for r in tried.remedies if r.why]
    if tried.time_noise is not None:
        lines.append(
            f"[dim]step time and memory: to the unchanged run, timed before and after each change; its own timings "
            f"differ by up to {tried.time_noise:.0%}[/]"
        )
    return lines


def verdict(tried: Counterfactual) -> str:
    """Whether the cause is confirmed."""
    cause = CAUSES.get(tried.first_nonfinite.cause, "an unknown cause")
    if tried.confirmed_by:
        return f"[bold green]confirmed[/]: {cause}. Without it the run survives: {escape(', '.join(tried.confirmed_by))}"
    if not tried.reproduced:
        return "[bold yellow]nothing is confirmed[/]: the unchanged run did not fail as it had, so survival proves nothing"
    return f"[bold yellow]not confirmed[/]: no change that was tried removes {cause} and survives"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
