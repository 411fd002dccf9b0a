"""What runs inside a process of the matrix. Imported once by the fork server, so that the
imports below are paid for once and not by every run.

bitsandbytes must not be imported here: its import initialises CUDA, and a forked process cannot
use a CUDA context made before the fork.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import transformers.models.gpt2.modeling_gpt2
import transformers.models.roberta.modeling_roberta  # noqa: F401  (paid here, once)

from harness.run import execute
from harness.settings import RunSettings
from instrument.records import RunRecord, StepRecord


def run_in_process(settings: RunSettings, out: Path, reports: Connection) -> None:
    """Execute one run; sends `StepRecord`s while it goes, then the `RunRecord` or the error's text."""
    _redirect_output(out, settings.run_id)
    try:
        record: RunRecord | str = execute(settings, out, lambda row: _send_steps(reports, row))
    except Exception as error:
        record = f"{type(error).__name__}: {error}"
    reports.send(record)
    reports.close()


def _send_steps(reports: Connection, row: object) -> None:
    if isinstance(row, StepRecord):
        reports.send(row)


def _redirect_output(out: Path, run_id: str) -> None:
    """Libraries' warnings go into the run's folder, not through the live table."""
    path = out / "runs" / run_id / "output.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
