"""Runs in processes of their own, some at a time, started from a fork server.

The server has torch, the models and the harness imported and nothing initialised, so a process
starts in milliseconds; a crash, a leak or an out-of-memory kill ends with the process, and is a row.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.crash_record import amend, write_crash_record
from harness.supervisor.failure import Failure, failure_of
from harness.supervisor.heartbeat import Draft, Heartbeat
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.claims import RunClaimed
from instrument.results.folder import OutputError
from instrument.results.schemas import RunRecord, StepRecord, decode

STARTS = 3
"""Tries to start a process: a fork server that was killed is started again by the next try."""


PF_EXITING = 0x4
"""Linux sets it in a process' flags (``/proc/PID/stat``) before it closes its files."""


@dataclass
class Running:
    """A run in its process, the watch over it, and the last step it reported."""

    settings: RunSettings
    process: multiprocessing.process.BaseProcess
    reports: Connection
    vigil: ProcessMonitor
    started_s: float = field(default_factory=time.monotonic)
    last_step: StepRecord | None = None
    draft: RunRecord | None = None


@dataclass(frozen=True)
class ProcessExit:
    """A run that is over: its terminal row as it was written (that of its death, if it died), or why there is none.
    Both None: it was stopped before it could write one."""

    settings: RunSettings
    record: RunRecord | None
    failure: OutputError | RunClaimed | None
    duration_s: float


class Pool:
    """At most ``jobs`` runs at a time, in the order of ``queue`` (which may grow meanwhile). When ``stop`` is
    requested no other run begins, and those that run end behind a checkpoint. ``rules`` say when a run hangs."""

    def __init__(
        self, queue: list[RunSettings], out: Path, jobs: int, stop: Stop | None = None, rules: Rules | None = None
    ) -> None:
        self.queue = queue
        self.out = out
        self.jobs = jobs
        self.stop = stop or Stop()
        self.rules = rules or Rules()
        self._told = False
        self.running: list[Running] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["harness.supervisor.worker" if torch.cuda.is_available() else "harness.supervisor.worker_without_gpu"]
        )

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[ProcessExit]:
        """Yield every run as it ends; ``tick`` is called while waiting. Leaves no process behind."""
        try:
            while self.running or (self.queue and not self.stop.requested):
                self._pass_on_the_stop()
                while self.queue and len(self.running) < self.jobs and not self.stop.requested:
                    self.running.append(self._start(self.queue.pop(0)))
                ready = wait([run.reports for run in self.running], timeout=seconds_between_ticks)
                for run in list(self.running):
                    ended = self._receive(run) if run.reports in ready else self._look(run)
                    if ended is not None:
                        self.running.remove(run)
                        yield ended
                tick()
        finally:
            for run in self.running:  # a second signal, or an error of ours
                run.process.kill()
                run.process.join()
                run.vigil.close()

    def _pass_on_the_stop(self) -> None:
        """Once: the processes have groups and terminals in common with us by chance only."""
        if self.stop.requested and not self._told:
            self._told = True
            for run in self.running:
                run.process.terminate()

    def _start(self, settings: RunSettings) -> Running:
        vigil = ProcessMonitor(self.rules)
        for tries_left in reversed(range(STARTS)):
            here, there = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_enter, args=(settings, self.out, there, vigil.stacks.path), daemon=True)
            try:
                process.start()
            except (EOFError, ConnectionError):  # the fork server has just died
                here.close()
                if not tries_left:
                    raise
            finally:
                there.close()
            if process.pid is not None:
                break
        vigil.begin(process.pid)
        return Running(settings, process, here, vigil)

    def _receive(self, run: Running) -> ProcessExit | None:
        """Take one message; None while the run goes on."""
        try:
            message = run.reports.recv()
        except (EOFError, ConnectionResetError):  # the process is gone without its last word
            message = None
        if isinstance(message, (StepRecord, Heartbeat, Draft)):
            run.vigil.hear(message if isinstance(message, Heartbeat) else None)
            run.last_step = message if isinstance(message, StepRecord) else run.last_step
            run.draft = decode(message.row, RunRecord) if isinstance(message, Draft) else run.draft
            return None
        run.process.join()
        return self._end(run, message)

    def _look(self, run: Running) -> ProcessExit | None:
        """At a run that has nothing to tell; None while there is hope."""
        run.vigil.look()
        return self._end(run, None) if run.vigil.given_up else None

    def _end(self, run: Running, message: RunRecord | Failure | OutputError | RunClaimed | None) -> ProcessExit:
        """What became of a run, from its last message, or from how its process ended."""
        duration_s = time.monotonic() - run.started_s
        try:
            if isinstance(message, (OutputError, RunClaimed)):
                return ProcessExit(run.settings, None, message, duration_s)
            if message is None and self._told and not run.vigil.hung:  # it had not begun to listen, or nothing to finish
                return ProcessExit(run.settings, None, None, duration_s)
            if isinstance(message, RunRecord):
                slow = run.vigil.hung and message.status == "preempted"
                record = amend(message, self.out, run.vigil.hang()) if slow else message
            else:
                record = self._bury(run, message)
            return ProcessExit(run.settings, record, None, duration_s)
        except (OutputError, RunClaimed) as error:
            return ProcessExit(run.settings, None, error, duration_s)
        finally:
            run.reports.close()
            run.vigil.close()

    def _bury(self, run: Running, death: Failure | None) -> RunRecord:
        draft = run.draft or summarize(run.settings, Outcome())
        return write_crash_record(draft, self.out, run.vigil, _exit_code(run.process), death)


def supervise(
    settings: RunSettings,
    out: Path,
    *,
    stop: Stop | None = None,
    on_step: Callable[[StepRecord], None] = lambda step: None,
    rules: Rules | None = None,
    tick: Callable[[], None] = lambda: None,
    seconds_between_ticks: float = 0.25,
) -> ProcessExit:
    """One run in a fresh process, to its end; for whoever has no matrix (a task on another machine). ``on_step`` gets
    the last step reported, where it is another, at every tick."""
    pool, shown = Pool([settings], out, jobs=1, stop=stop, rules=rules), 0

    def look() -> None:
        nonlocal shown
        for run in pool.running:
            if run.last_step is not None and run.last_step.step != shown:
                shown = run.last_step.step
                on_step(run.last_step)
        tick()

    return next(pool.run(look, seconds_between_ticks), ProcessExit(settings, None, None, 0.0))


def _enter(settings: RunSettings, out: Path, reports: Connection, stacks: Path) -> None:
    """First function of a run's process; the import is free there, and not paid by the parent."""
    try:
        from harness.supervisor.worker import run_in_process
    except Exception as error:  # an installation that is broken or half updated
        reports.send(failure_of(error))
        return
    run_in_process(settings, out, reports, stacks)


def _exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    """How the process ended; None when nobody knows: the fork server, whose child it was, is gone too. `multiprocessing`
    says 255 then."""
    if process.exitcode != 255:
        return process.exitcode
    server = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)
    return None if server is None or _is_dying(server) else 255


def _is_dying(pid: int) -> bool:
    """Whether a process is gone or on its way: on a busy machine its pipes are closed for a while before it is a zombie."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return state in "ZX" or bool(int(numbers[5]) & PF_EXITING)
