"""What runs inside a process of the pool. The fork server imports this module once, so that its imports are not paid for by
every run.

bitsandbytes must not be imported here: its import initialises CUDA, and a forked process cannot use a CUDA context made before
the fork.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import transformers.models.gpt2.modeling_gpt2
import transformers.models.roberta.modeling_roberta  # noqa: F401  (paid for here, once)

from harness.failure import Failure, failure_of
from harness.run.execute import execute
from harness.run.heartbeat import HeartbeatSender, write_stacks_to
from harness.run.progress import checkpoint_steps
from harness.run.signals import Stop
from harness.settings import RunSettings
from instrument.results.claims import RunClaimed, owner_of
from instrument.results.files import make_folder
from instrument.results.folder import OutputError
from instrument.results.layout import RunFiles
from instrument.results.schemas import RunRecord, StepRecord

# Before the fork server imports it: see `harness.optimizer.eight_bit_adamw`.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_in_process(settings: RunSettings, out: Path, stacks: Path, reports: Connection) -> None:
    """Execute one run; sends `StepRecord`s, heartbeats and a draft of its row, then the `RunRecord`, the `Failure` of one that
    could not begin, an `OutputError` or a `RunClaimed`. SIGTERM ends it after a checkpoint."""
    stop = Stop()
    stop.obey_the_matrix()
    stop.heartbeat = HeartbeatSender(lambda message: _send(reports, message, stop))
    result: RunRecord | OutputError | RunClaimed | Failure
    try:
        write_stacks_to(stacks)
        if (owner := owner_of(out, settings.run_id)) is not None:  # before its output is written to
            raise RunClaimed(settings.run_id, owner)
        _redirect_output(out, settings.run_id)
        result = execute(settings, out, lambda row: isinstance(row, StepRecord) and _send(reports, row, stop), stop=stop)
    except (OutputError, RunClaimed) as error:  # every other run's, too; and nobody's row
        result = error
    except (Exception, SystemExit) as error:
        result = failure_of(error, settings.device, stop.heartbeat.phase)
    with suppress(BrokenPipeError):
        reports.send(result)
    reports.close()


def _send(reports: Connection, message: object, stop: Stop) -> None:
    try:
        reports.send(message)
    except BrokenPipeError:  # the matrix was killed; whoever starts it again must not find this process in the way
        stop.request("the end of the matrix")


def _redirect_output(out: Path, run_id: str) -> None:
    """Libraries' warnings go into the run's folder, not through the live table; a resumed run appends."""
    path = RunFiles(out, run_id).output
    mode = os.O_APPEND if checkpoint_steps(path.parent) else os.O_TRUNC
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o644)
    except OSError as error:
        raise OutputError.of(error, path) from error
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
