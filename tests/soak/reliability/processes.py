"""``python -m harness case`` with a small run, each time in a process of its own; what it reported before it ended."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness import cli
from harness.options import option_words
from harness.planning import plan_run
from harness.settings import Request, RunSettings
from instrument.results.schemas import Record, StepRecord
from tests import crash_hook
from tests.harness.commands import PRELOADED

HUNG_S = 180.0
"""A run of some steps that takes this long hangs."""
MOST_HEARD_BYTES = 1 << 20
SMALL = {
    "preset": "tiny",
    "device": "cpu",
    "data": "embedded",
    "batch_size": 2,
    "micro_batch": 2,
    "seq_len": 16,
    "documents": 400,
    "validation_documents": 2,
}
ASKED = (*SMALL, "max_steps", "eval_every", "checkpoint_every")


@dataclass
class ProcessResult:
    """``acknowledged``: the rows that a person was shown, in order. ``exit_code`` as of `multiprocessing`: negative for a
    signal, None where the process had to be killed for hanging. ``stderr``: what it printed. ``operations``: on files,
    where they were counted."""

    acknowledged: list[Record] = field(default_factory=list)
    exit_code: int | None = None
    stderr: str = ""
    operations: int | None = None

    @property
    def steps(self) -> int:
        """Steps acknowledged."""
        return sum(isinstance(record, StepRecord) for record in self.acknowledged)

    @property
    def sentence(self) -> str:
        """The last line on standard error."""
        return (self.stderr.strip().splitlines() or ["nothing"])[-1]


@dataclass(frozen=True)
class Blow:
    """``strike(process id)`` is called ``delay_s`` after the process has shown ``after`` steps (0: after it has begun)."""

    strike: Callable[[int], object]
    after: int
    delay_s: float = 0.0


def signalled(number: signal.Signals, after: int, delay_s: float) -> Blow:
    """A signal as a blow."""
    return Blow(lambda process_id: os.kill(process_id, number), after, delay_s)


def small(config: str = "amp_fp16", case: str = "gpt2_single_cls", **asked: Any) -> RunSettings:
    """The settings of a run of a few steps on a CPU."""
    return plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**SMALL | asked), torch.device("cpu"))


def start(target: Callable, *arguments: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Call ``target(reports, *arguments)`` in a process forked from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def asked_to_stop() -> None:
    """For ``then``: SIGTERM comes."""
    os.kill(os.getpid(), signal.SIGTERM)


def run(
    settings: RunSettings,
    out: Path,
    *,
    crash_at: int = 0,
    then: tuple[int, Callable[[], object]] | None = None,
    blow: Blow | None = None,
    prepare: Callable[[], None] | None = None,
) -> ProcessResult:
    """Give the command and wait for its end: it dies before its file operation number ``crash_at``, does something when it
    has shown a step (``then``: which, and what), or suffers a blow. ``prepare`` is called first, in its process."""
    words = ["case", settings.case.id, settings.config.id, "--out", str(out)]
    words += option_words({name: getattr(settings, name) for name in ASKED})
    reading, writing = os.pipe()  # a file would count among the operations, and against a limit on files
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, MOST_HEARD_BYTES)
    process, reports = start(_case, words, f"/proc/{os.getpid()}/fd/{writing}", crash_at, then, prepare)
    ended = _listen(process, reports, blow)
    os.close(writing)
    with open(reading, "rb") as heard:
        ended.stderr = heard.read().decode(errors="replace")
    return ended


def _listen(process: multiprocessing.process.BaseProcess, reports: Connection, blow: Blow | None) -> ProcessResult:
    ended, until_s, begun = ProcessResult(), time.monotonic() + HUNG_S, False
    while True:
        if blow is not None and begun and ended.steps >= blow.after:
            time.sleep(blow.delay_s)
            if process.is_alive():
                blow.strike(process.pid)
            blow = None
        if not reports.poll(max(0.0, until_s - time.monotonic())):
            process.kill()
            process.join()
            return ended
        try:
            message = reports.recv()
        except (EOFError, OSError):
            break
        if isinstance(message, Record):
            ended.acknowledged.append(message)
        elif begun:
            ended.operations = message
        begun = True
    process.join()
    ended.exit_code = process.exitcode
    return ended


def _case(
    reports: Connection,
    words: list[str],
    heard: str,
    crash_at: int,
    then: tuple[int, Callable[[], object]] | None,
    prepare: Callable[[], None] | None,
) -> None:
    """In the process: the command, and every row that the screen shows is sent as well."""
    from harness.run.terminal import CaseScreen

    show, errors = CaseScreen.show, os.open(heard, os.O_WRONLY)
    os.dup2(errors, 1)
    os.dup2(errors, 2)

    def show_and_send(screen: CaseScreen, record: Record) -> None:
        show(screen, record)
        reports.send(record)
        if then is not None and isinstance(record, StepRecord) and record.step == then[0]:
            then[1]()

    CaseScreen.show = show_and_send
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does first of all
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a bench in the background ignores it, and passes that on
    reports.send(0)
    if prepare is not None:
        prepare()
    crash_hook.crash_at(crash_at)
    code = cli.main(words)
    reports.send(crash_hook.operations())
    crash_hook.crash_at(0)
    sys.exit(code)
