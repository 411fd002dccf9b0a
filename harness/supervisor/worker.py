"""What runs inside a process of the matrix. Imported once by the fork server, so that the
imports below are paid for once and not by every run.

bitsandbytes must not be imported here: its import initialises CUDA, and a forked process cannot
use a CUDA context made before the fork.
"""

from __future__ import annotations

import os
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import transformers.models.gpt2.modeling_gpt2
import transformers.models.roberta.modeling_roberta  # noqa: F401  (paid here, once)

from harness.run import checkpoint_files
from harness.run.execute import execute
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.failure import Failure, failure_of
from harness.supervisor.heartbeat import HeartbeatSender, write_stacks_to
from instrument.results.claims import RunClaimed, owner_of
from instrument.results.folder import OutputError
from instrument.results.schemas import RunRecord, StepRecord


def run_in_process(settings: RunSettings, out: Path, reports: Connection, stacks: Path) -> None:
    """Execute one run; sends `StepRecord`s and signs of life while it goes, then the `RunRecord`, the `Death` of one that
    could not begin, an `OutputError` or a `RunClaimed`. SIGTERM ends it behind a checkpoint."""
    stop = Stop()
    stop.obey_the_matrix()
    stop.pulse = HeartbeatSender(lambda message: _tell(reports, message, stop))
    ended: RunRecord | OutputError | RunClaimed | Failure
    try:
        write_stacks_to(stacks)
        if (owner := owner_of(out, settings.run_id)) is not None:  # before its output is written to
            raise RunClaimed(settings.run_id, owner)
        _redirect_output(out, settings.run_id)
        ended = execute(settings, out, lambda row: _tell_steps(reports, row, stop), stop=stop)
    except (OutputError, RunClaimed) as error:  # every other run's, too; and nobody's row
        ended = error
    except (Exception, SystemExit) as error:
        ended = failure_of(error, settings.device)
    with suppress(BrokenPipeError):
        reports.send(ended)
    reports.close()


def _tell_steps(reports: Connection, row: object, stop: Stop) -> None:
    if isinstance(row, StepRecord):
        _tell(reports, row, stop)


def _tell(reports: Connection, message: object, stop: Stop) -> None:
    try:
        reports.send(message)
    except BrokenPipeError:  # killed; whoever starts it again must not find this process in the way
        stop.request("the end of the matrix")


def _redirect_output(out: Path, run_id: str) -> None:
    """Libraries' warnings go into the run's folder, not through the live table; those of a run that goes on are
    added to."""
    path = out / "runs" / run_id / "output.log"
    goes_on = os.O_APPEND if checkpoint_files.steps(path.parent) else os.O_TRUNC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | goes_on, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
