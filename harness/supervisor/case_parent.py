"""``python -m harness case`` in two processes: the run, and a thin one that outlives it, so that a crash of a single run
is a row too. Torch-free; the run's process is forked from here before anything heavy is imported.

The run has the terminal. Ctrl-C reaches both processes, and this one waits; a signal sent to this one alone is passed on.
When this one dies, so does the run (SIGKILL): whoever ends it means the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from harness.exit_codes import ENVIRONMENT, INTERRUPTED, RUN_FAILED
from harness.supervisor.failure import Failure
from harness.supervisor.heartbeat import Draft, Heartbeat, HeartbeatSender, write_stacks_to
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.files import CRASH_VARIABLE
from instrument.results.schemas import RunRecord, decode, encode
from instrument.terminal import reader_may_leave

ELSEWHERE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", CRASH_VARIABLE)
"""torchrun supervises its ranks; and the crash sweep stands for a machine that dies whole."""
HEARD = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
SECONDS_BETWEEN_LOOKS = 0.25
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Finished:
    """The command came to its own end, with this exit code."""

    code: int


def is_wanted(options: argparse.Namespace, variable: Callable[[str], str | None]) -> bool:
    """Whether a ``case`` command makes a run that nobody else supervises. ``variable``: the environment's."""
    return not options.dry_run and not any(variable(name) for name in ELSEWHERE)


def run_supervised(options: argparse.Namespace, run: Callable[[argparse.Namespace, HeartbeatSender], int]) -> int:
    """``run`` the ``case`` command in a process of its own; returns its exit code."""
    vigil = ProcessMonitor(Rules.asked(options.hang_after_s))
    here, there = Pipe(duplex=False)
    parent, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    pid = os.fork()
    if pid == 0:
        here.close()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _run(lambda heartbeats: run(options, heartbeats), there, vigil.stacks.path, parent)
    there.close()
    vigil.begin(pid)
    family = ChildProcess(pid, here, vigil)
    exit_code = family.wait()
    with reader_may_leave() as reader:
        reader.needed = False
        return family.conclude(exit_code, options)


def _run(run: Callable[[HeartbeatSender], int], reports: Connection, stacks: Path, parent: int) -> None:
    """In the run's process: the command, and its end for the supervisor."""
    _die_with(parent)
    write_stacks_to(stacks)

    def say(message: object) -> None:
        with suppress(BrokenPipeError):  # the parent is gone, and this process about to follow
            reports.send(message)

    try:
        code = run(HeartbeatSender(say))
    except KeyboardInterrupt:  # before it was ready to hear of it, or behind its end
        code = INTERRUPTED
    say(Finished(code))
    sys.exit(code)


def _die_with(parent: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before it could be heard of
        os._exit(ENVIRONMENT)


class ChildProcess:
    """The supervisor's view of its one run."""

    def __init__(self, pid: int, reports: Connection, vigil: ProcessMonitor) -> None:
        self.pid, self.reports, self.vigil = pid, reports, vigil
        self.draft: Draft | None = None
        self.death: Failure | None = None
        self.finished: Finished | None = None
        self._open = True

    def wait(self) -> int | None:
        """Until the run's process is gone; its exit code, negative for a signal, None for one that nobody can kill."""
        while True:
            gone, status = os.waitpid(self.pid, os.WNOHANG)
            self._hear()
            if gone:
                return os.waitstatus_to_exitcode(status)
            self.vigil.look()
            if self.vigil.given_up:
                return None
            told = signal.sigtimedwait(HEARD, SECONDS_BETWEEN_LOOKS)
            if told is not None and told.si_signo != signal.SIGCHLD and told.si_code <= 0:  # a terminal tells both
                self.vigil.send(told.si_signo)

    def _hear(self) -> None:
        while self._open and self.reports.poll():
            try:
                message = self.reports.recv()
            except (EOFError, ConnectionResetError):
                self._open = False
                return
            self.vigil.hear(message if isinstance(message, Heartbeat) else None)
            if isinstance(message, Draft):
                self.draft = message
            elif isinstance(message, Finished):
                self.finished = message
            elif isinstance(message, Failure):
                self.death = message

    def conclude(self, exit_code: int | None, options: argparse.Namespace) -> int:
        """The command's exit code; a run that wrote no row of its own gets it here, and is shown."""
        try:
            hung = self.vigil.hung and (self.finished is None or self.finished.code == INTERRUPTED)
            told = self.death is not None and self.death.cause not in ("exception", "bad_data")  # those are for people to mend
            if self.finished is not None and not hung and not told:
                return self.finished.code
            if self.draft is None:
                return self._without_a_run(exit_code)
            row = self._row(exit_code)
        finally:
            self.vigil.close()
        show(row, Path(self.draft.out), options.json)
        return RUN_FAILED

    def _row(self, exit_code: int | None) -> RunRecord:
        """The row of the run that this process has outlived."""
        from harness.supervisor.crash_record import amend, write_crash_record
        from instrument.results.folder import finished_run

        draft, out = decode(self.draft.row, RunRecord), Path(self.draft.out)
        written = finished_run(out, draft.run_id) if self.vigil.opened else None
        if self.vigil.hung and written is not None and written.status == "preempted":
            return amend(written, out, self.vigil.hang())
        return write_crash_record(draft, out, self.vigil, exit_code, self.death)

    def _without_a_run(self, exit_code: int | None) -> int:
        if exit_code is not None and exit_code >= 0:
            return exit_code
        print(
            f"harness: {self.vigil.death(exit_code, 0, Path(os.devnull)).error}; it had not yet got to a run, so there is "
            f"no row",
            file=sys.stderr,
        )
        return ENVIRONMENT


def show(row: RunRecord, out: Path, as_json: bool) -> None:
    """What the run itself would have shown at its end."""
    from rich.console import Console

    from harness.run.terminal import show_summary

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:  # a bar that was killed leaves its line and no cursor
        console.show_cursor(True)
        console.print()
    show_summary(console, row, out)
    if as_json:
        sys.stdout.write(encode(row).decode() + "\n")
