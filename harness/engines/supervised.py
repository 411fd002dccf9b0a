"""One run in a fresh process, for whoever has no matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.pool import Pool
from harness.run_folder import OutputError
from harness.settings import RunSettings
from harness.signals import Stop
from instrument.records import StepRecord


def supervise(settings: RunSettings, out: Path, stop: Stop, on_step: Callable[[StepRecord], None]) -> None:
    """Execute a run into ``out``, where its row then is (none when it was stopped before it could write one); ``on_step``
    gets its last step now and then. Raises `OutputError` when ``out`` cannot be written."""
    pool = Pool([settings], out, jobs=1, stop=stop)

    def look() -> None:
        for run in pool.running:
            if run.last_step is not None:
                on_step(run.last_step)

    for ended in pool.run(look):
        if isinstance(ended.failure, str):
            from harness.matrix import crashed

            crashed(ended, out)
        elif isinstance(ended.failure, OutputError):
            raise ended.failure
