"""``python -m harness inspect RUN --try CHANGE ...``: what would have helped, tried out."""

from __future__ import annotations

import argparse
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from harness.exit_codes import OK
from harness.settings import SettingsError
from instrument.count import count
from instrument.forensics_record import Remedy

CAUSES = {
    "overflow": "overflow",
    "underflow_then_divide": "underflow, then division by it",
    "invalid": "an invalid operation",
    "from_input": "a value that came in from outside the step",
}


def try_command(options: argparse.Namespace) -> int:
    """Try the changes, print a table; ``--json`` prints the trial as one object on standard output."""
    from harness.inspect.locate import locate

    if options.repro is not None:
        raise SettingsError("--try and --repro are two commands; give one of them")
    if options.steps is not None and options.steps < 1:
        raise SettingsError(f"--steps is {options.steps}; it must be at least 1")
    run = locate(options.run, options.out)
    from harness.forensics.changes import refuse_unknown

    refuse_unknown(options.changes)
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        from harness.forensics.counterfactual import try_changes

        trial = try_changes(run.path, options.changes, options.steps, lambda words: status.update(f"replaying: {words}"))
    if options.json:
        import msgspec

        row = msgspec.to_builtins(trial) | {"confirmed_by": trial.confirmed_by}
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        return OK
    for line in heading(trial):
        console.print(line)
    console.print(table(trial.remedies))
    for line in notes(trial):
        console.print(Padding(line, (0, 0, 0, 2)))
    console.print(verdict(trial))
    return OK


def heading(trial) -> list[str]:
    """What failed, from where it was replayed, and whether the control failed again."""
    again = (
        f"[green]fails again at step {trial.control_failed_at}[/]"
        if trial.reproduced
        else (
            "[yellow]does not fail again[/]"
            if trial.control_failed_at is None
            else f"[yellow]fails in another way, at step {trial.control_failed_at}[/]"
        )
    )
    return [
        f"[bold]{escape(trial.run_id)}[/]",
        escape(trial.sentence),
        f"from the snapshot behind step {trial.snapshot_step} up to step {trial.last_step}; unchanged, it {again}",
        *(f"[yellow]another machine: {escape(warning)}[/]" for warning in trial.warnings),
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
    """Survives or not, in a word or two."""
    if remedy.survives is None:
        return "[dim]not tried[/]"
    if remedy.survives:
        return f"[green]survives {count(remedy.steps, 'step')}[/]"
    return f"[red]fails at step {remedy.failed_at}[/]" if remedy.failed_at is not None else "[red]trains nothing[/]"


def notes(trial) -> list[str]:
    """What the table has no room for."""
    lines = [f"{escape(r.change)}: [dim]{escape(r.why)}[/]" for r in trial.remedies if r.why]
    if trial.time_noise is not None:
        lines.append(
            f"[dim]step time and memory: to the unchanged run, timed before and behind each change; its own timings "
            f"differ by up to {trial.time_noise:.0%}[/]"
        )
    return lines


def verdict(trial) -> str:
    """Whether the cause is confirmed."""
    cause = CAUSES.get(trial.first_nonfinite.cause, "an unknown cause")
    if trial.confirmed_by:
        return f"[bold green]confirmed[/]: {cause}. Without it the run survives: {escape(', '.join(trial.confirmed_by))}"
    if not trial.reproduced:
        return "[bold yellow]nothing is confirmed[/]: the unchanged run did not fail as it had, so survival proves nothing"
    return f"[bold yellow]not confirmed[/]: no change that was tried removes {cause} and survives"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
