"""Runs in processes of their own, some at a time, started from a fork server.

The server has torch, the models and the harness imported and nothing initialised, so a process
starts in milliseconds; a crash, a leak or an out-of-memory kill ends with the process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from harness.claims import RunClaimed
from harness.run_folder import OutputError
from harness.settings import RunSettings
from harness.signals import Stop
from instrument.records import RunRecord, StepRecord


@dataclass
class Running:
    """A run in its process, and the last step it reported."""

    settings: RunSettings
    process: multiprocessing.process.BaseProcess
    reports: Connection
    started_s: float = field(default_factory=time.monotonic)
    last_step: StepRecord | None = None


@dataclass(frozen=True)
class Ended:
    """A run that is over: its row, or why there is none. Both None: it was stopped before it could write one."""

    settings: RunSettings
    record: RunRecord | None
    failure: str | OutputError | RunClaimed | None
    duration_s: float


class Pool:
    """At most ``jobs`` runs at a time, in the order of ``queue`` (which may grow meanwhile). When ``stop`` is
    requested no other run begins, and those that run end behind a checkpoint."""

    def __init__(self, queue: list[RunSettings], out: Path, jobs: int, stop: Stop | None = None) -> None:
        self.queue = queue
        self.out = out
        self.jobs = jobs
        self.stop = stop or Stop()
        self._told = False
        self.running: list[Running] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["harness.worker" if torch.cuda.is_available() else "harness.worker_without_gpu"])

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[Ended]:
        """Yield every run as it ends; ``tick`` is called while waiting. Leaves no process behind."""
        try:
            while self.running or (self.queue and not self.stop.requested):
                self._pass_on_the_stop()
                while self.queue and len(self.running) < self.jobs and not self.stop.requested:
                    self.running.append(self._start(self.queue.pop(0)))
                ready = wait([run.reports for run in self.running], timeout=seconds_between_ticks)
                for run in [run for run in self.running if run.reports in ready]:
                    ended = self._receive(run)
                    if ended is not None:
                        self.running.remove(run)
                        yield ended
                tick()
        finally:
            for run in self.running:  # a second signal, or an error of ours
                run.process.kill()
                run.process.join()

    def _pass_on_the_stop(self) -> None:
        """Once: the processes have groups and terminals in common with us by chance only."""
        if self.stop.requested and not self._told:
            self._told = True
            for run in self.running:
                run.process.terminate()

    def _start(self, settings: RunSettings) -> Running:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_enter, args=(settings, self.out, there), daemon=True)
        process.start()
        there.close()
        return Running(settings, process, here)

    def _receive(self, run: Running) -> Ended | None:
        """Take one message; None while the run goes on."""
        try:
            message = run.reports.recv()
        except (EOFError, ConnectionResetError):  # the process is gone without its last word
            message = None
        if isinstance(message, StepRecord):
            run.last_step = message
            return None
        run.process.join()
        duration_s = time.monotonic() - run.started_s
        if isinstance(message, RunRecord):
            return Ended(run.settings, message, None, duration_s)
        if message is None and self._told:  # it had not begun to listen, or nothing to finish
            return Ended(run.settings, None, None, duration_s)
        return Ended(run.settings, None, message or _death(run.process.exitcode), duration_s)


def _enter(settings: RunSettings, out: Path, reports: Connection) -> None:
    """First function of a run's process; the import is free there, and not paid by the parent."""
    from harness.worker import run_in_process

    run_in_process(settings, out, reports)


def _death(exit_code: int | None) -> str:
    """Why a process ended without a word."""
    import signal

    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (the kernel kills so when memory runs out)" if name == "SIGKILL" else ""
        return f"the run's process was killed by {name}{hint}"
    return f"the run's process exited with code {exit_code} without a result"
