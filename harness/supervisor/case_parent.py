"""``python -m harness case`` in two processes: the run, and a thin parent that outlives it, so that a crash of a single run
is a row too. Torch-free; the run's process is forked from here before anything heavy is imported.

The run has the terminal. Ctrl-C reaches both processes, and the parent waits; a signal sent to the parent alone is passed on.
When the parent ends, so does the run (SIGKILL): whoever kills it means the run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from harness.exit_codes import ENVIRONMENT, INTERRUPTED, OK, RUN_FAILED
from harness.failure import Failure
from harness.run.heartbeat import HeartbeatSender, write_stacks_to
from harness.run.signals import interrupt_on_signals
from harness.supervisor.child_process import ChildProcess, ForkedProcess
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.schemas import RunRecord, decode, encode
from instrument.terminal import reader_may_leave, rich_console

SUPERVISED_ELSEWHERE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
"""torchrun supervises its ranks."""
SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
SECONDS_BETWEEN_LOOKS = 0.25


def is_wanted(options: argparse.Namespace, variable: Callable[[str], str | None]) -> bool:
    """Whether a ``case`` command makes a run that nobody else supervises. ``variable``: the environment's."""
    return not options.dry_run and not any(variable(name) for name in SUPERVISED_ELSEWHERE)


def run_supervised(options: argparse.Namespace, run: Callable[[argparse.Namespace, HeartbeatSender], int]) -> int:
    """``run`` the ``case`` command in a process of its own; returns its exit code."""
    monitor = ProcessMonitor(Rules.asked(options.hang_after_s))
    stacks, mask = monitor.stacks.path, signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def enter(send: Callable[[object], None]) -> int:
        """In the run's process: the command, and its end for the parent."""
        interrupt_on_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        write_stacks_to(stacks)
        try:
            code = run(options, HeartbeatSender(send))
        except KeyboardInterrupt:  # before the command handles signals, or after its end
            code = INTERRUPTED
        send(code)  # it came to its own end
        return code

    child = ForkedProcess(enter, monitor)
    exit_code = wait(child)
    with reader_may_leave() as reader:
        reader.needed = False
        return conclude(child, exit_code, options)


def wait(child: ChildProcess) -> int | None:
    """Waits for the run's process and returns its exit code: negative for a signal, None for one that nobody can kill."""
    while True:
        running = child.running()
        child.receive()
        if not running or child.monitor.given_up:
            return child.exit_code()
        child.monitor.look()
        received = signal.sigtimedwait(SIGNALS, SECONDS_BETWEEN_LOOKS)
        if received is not None and received.si_signo != signal.SIGCHLD and received.si_code <= 0:  # a terminal signals both
            child.monitor.send(received.si_signo)


def conclude(child: ChildProcess, exit_code: int | None, options: argparse.Namespace) -> int:
    """The command's exit code; a run that wrote no row of its own gets it here, and is shown."""
    finished = next((result for result in child.results if isinstance(result, int)), None)
    failure = next((result for result in reversed(child.results) if isinstance(result, Failure)), None)
    try:
        hung = child.monitor.hung and finished in (None, INTERRUPTED)
        failed = failure is not None and failure.cause not in ("exception", "bad_data")  # those are for people to mend
        if finished is not None and not hung and not failed:
            return finished
        if child.draft is None and exit_code is not None and exit_code >= 0:
            return exit_code
        if child.draft is None:
            why = child.monitor.failure(exit_code, 0).error
            print(f"harness: {why}; the run had not begun, so there is no row", file=sys.stderr)
            return ENVIRONMENT
        row = _row(child, exit_code, failure)
    finally:
        child.close()
    show(row, Path(child.draft.out), options.json)
    return OK if row.status == "diverged" else RUN_FAILED


def _row(child: ChildProcess, exit_code: int | None, failure: Failure | None) -> RunRecord:
    """The row of the run that this process has outlived."""
    from harness.supervisor.crash_record import amend, write_crash_record
    from instrument.results.folder import finished_run

    draft, out = decode(child.draft.row, RunRecord), Path(child.draft.out)
    written = finished_run(out, draft.run_id) if child.monitor.opened else None
    if child.monitor.hung and written is not None and written.status == "preempted":
        return amend(written, out, child.monitor.hang())
    return write_crash_record(draft, out, child.monitor, exit_code, failure)


def show(row: RunRecord, out: Path, as_json: bool) -> None:
    """What the run itself would have shown at its end."""

    from harness.run.terminal import show_summary

    console = rich_console(stderr=True, soft_wrap=True)
    if console.is_terminal:  # a bar that was killed leaves its line and no cursor
        console.show_cursor(True)
        console.print()
    show_summary(console, row, out)
    if as_json:
        sys.stdout.write(encode(row).decode() + "\n")
