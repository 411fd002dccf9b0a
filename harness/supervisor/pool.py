"""Runs in processes of their own, some at a time, started from a fork server.

The server has torch, the models and the harness imported and nothing initialised, so a process starts in milliseconds; a crash,
a leak or an out-of-memory kill ends with the process, and is a row.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from harness.failure import failure_of
from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.child_process import ChildProcess, ForkServerProcess
from harness.supervisor.crash_record import amend, write_crash_record
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.claims import RunClaimed
from instrument.results.folder import OutputError
from instrument.results.schemas import RunRecord, StepRecord, decode


@dataclass
class Running:
    """A run and its process."""

    settings: RunSettings
    child: ChildProcess
    started_s: float = field(default_factory=time.monotonic)

    @property
    def last_step(self) -> StepRecord | None:
        """The last step it reported."""
        return self.child.last_step


@dataclass(frozen=True)
class ProcessExit:
    """A run that is over: its terminal row as it was written (its crash record, if it failed), or why there is none. Both
    None: it was stopped before it could write one."""

    settings: RunSettings
    record: RunRecord | None
    failure: OutputError | RunClaimed | None
    duration_s: float


class Pool:
    """At most ``jobs`` runs at a time, in the order of ``queue`` (which may grow meanwhile). When ``stop`` is requested no
    other run begins, and those that run end after a checkpoint. ``rules`` say when a run hangs."""

    def __init__(
        self, queue: list[RunSettings], out: Path, jobs: int, stop: Stop | None = None, rules: Rules | None = None
    ) -> None:
        self.queue, self.out, self.jobs = queue, out, jobs
        self.stop, self.rules = stop or Stop(), rules or Rules()
        self.running: list[Running] = []
        self._stopping = False
        self._preload = ["harness.supervisor.worker"]
        if not torch.cuda.is_available():  # its import initialises CUDA, where there is any
            self._preload.append("bitsandbytes.optim")

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[ProcessExit]:
        """Yield every run as it ends; ``tick`` is called while waiting. Leaves no process running."""
        try:
            while self.running or (self.queue and not self.stop.requested):
                room = self._room()
                while self.queue and len(self.running) < room and not self.stop.requested:
                    started = self._start(self.queue.pop(0))
                    if isinstance(started, ProcessExit):
                        yield started
                    else:
                        self.running.append(started)
                for run in self._ended(seconds_between_ticks):
                    self.running.remove(run)
                    yield self._end(run)
                tick()
        finally:
            for run in self.running:  # a second signal, or an error of ours
                self._kill(run)

    def _room(self) -> int:
        """How many runs there may be now."""
        return self.jobs

    def _start(self, settings: RunSettings) -> Running | ProcessExit:
        """The run, or its end where there is nothing to start."""
        monitor = ProcessMonitor(self.rules)
        arguments = (settings, self.out, monitor.stacks.path)
        return Running(settings, ForkServerProcess(_enter, arguments, self._preload, monitor))

    def _ended(self, within_s: float) -> list[Running]:
        """The runs that are over, after the next message or ``within_s``."""
        if self.stop.requested and not self._stopping:
            self._stopping = True
            for run in self.running:  # the processes have groups and terminals in common with us by chance only
                run.child.monitor.send(signal.SIGTERM)
        children = [run.child for run in self.running]
        ready = wait([child.reports for child in children], timeout=within_s)
        for child in children:
            if child.reports in ready:
                child.receive()
            else:
                child.monitor.look()
        over = {child for child in children if child.results or not child.connected or child.monitor.given_up}
        return [run for run in self.running if run.child in over]

    def _end(self, run: Running) -> ProcessExit:
        """What became of a run, from its last message, or from how its process ended."""
        child, duration_s = run.child, time.monotonic() - run.started_s
        exit_code, result = child.exit_code(), child.results[0] if child.results else None
        try:
            if isinstance(result, (OutputError, RunClaimed)):
                return ProcessExit(run.settings, None, result, duration_s)
            if result is None and self._stopping and not child.monitor.hung:  # not yet listening, or nothing to finish
                return ProcessExit(run.settings, None, None, duration_s)
            if isinstance(result, RunRecord):
                late = child.monitor.hung and result.status == "preempted"
                record = amend(result, self.out, child.monitor.hang()) if late else result
            else:
                draft = decode(child.draft.row, RunRecord) if child.draft else summarize(run.settings, Outcome())
                record = write_crash_record(draft, self.out, child.monitor, exit_code, result)
            return ProcessExit(run.settings, record, None, duration_s)
        except (OutputError, RunClaimed) as error:
            return ProcessExit(run.settings, None, error, duration_s)
        finally:
            child.close()

    def _kill(self, run: Running) -> None:
        run.child.kill()


def _enter(settings: RunSettings, out: Path, stacks: Path, reports: Connection) -> None:
    """First function of a run's process; the import is free there, and not paid by the parent."""
    try:
        from harness.supervisor.worker import run_in_process
    except Exception as error:  # an installation that is broken or half updated
        reports.send(failure_of(error))
        return
    run_in_process(settings, out, stacks, reports)
