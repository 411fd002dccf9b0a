"""Writes the row of a run whose process wrote none: what it had reached, and what ended it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec

from harness.failure import Failure, after_divergence
from harness.run.progress import CHECKPOINT_PREFIX, checkpoint_steps, progress_summary
from harness.supervisor.process_monitor import ProcessMonitor
from instrument.results.claims import RunClaimed, claim
from instrument.results.files import require_there
from instrument.results.folder import OutputError, finished_run, output_error, write_terminal
from instrument.results.layout import RunFiles
from instrument.results.log import Appender
from instrument.results.schemas import UNREADABLE, RunRecord, StepRecord, decode


def write_crash_record(
    draft: RunRecord, out: Path, monitor: ProcessMonitor, exit_code: int | None, reported: Failure | None = None
) -> RunRecord:
    """Write the terminal row of the run that ``monitor`` watched, and return it. ``reported``: what the process itself said
    ended it; otherwise ``exit_code`` and the monitor's evidence tell. A row that the process had written, where it had begun to
    write the run's files, stands. Raises `OutputError`, and `RunClaimed` when another living process has the run by now."""
    steps = logged_steps(out, draft.run_id, monitor.opened)
    failure = reported or monitor.failure(exit_code, len(steps), RunFiles(out, draft.run_id).output)
    with _writing(out, draft.run_id if monitor.opened else None), _claim(out, draft.run_id, monitor.pid):
        if monitor.opened and (written := finished_run(out, draft.run_id)) is not None:
            return written
        row = with_failure(draft, failure, steps, _last_checkpoint(out, draft.run_id))
        _append_stack(out, row, failure)
        write_terminal(out, row)
    return row


@contextmanager
def _writing(out: Path, run_id: str | None) -> Iterator[None]:
    """Errors are `OutputError`; the folder of a run that had one (``run_id``) is not made again where somebody deleted it."""
    try:
        if run_id is not None:
            require_there(RunFiles(out, run_id).path)
        yield
    except OSError as error:
        raise output_error(error, out) or OutputError.of(error, out) from error


def _claim(out: Path, run_id: str, pid: int | None) -> AbstractContextManager:
    """The run's claim, or none where the process that nobody can kill still holds it."""
    try:
        return claim(out, run_id)
    except RunClaimed as error:
        if error.owner.get("pid") != pid:
            raise
        return nullcontext()


def with_failure(draft: RunRecord, failure: Failure, steps: list[StepRecord], checkpoint: str | None) -> RunRecord:
    """The draft with what was reached and how it ended. A run that failed before it began to write keeps the draft's; one that
    had diverged stays so, and what ended its forensics is a reason why less is known of it."""
    resumes = failure.resumable and checkpoint is not None
    error = f"{failure.error}; the same command resumes from {checkpoint}" if resumes else failure.error
    resumed = draft.flags.get("resumed") or {}
    facts = progress_summary(steps, draft.config["untimed_steps"], resumed.get("behind_steps", [])) if steps else {}
    if draft.status == "diverged":
        ended: dict[str, Any] = {"flags": after_divergence(draft.flags, failure.error, failure.flags)}
    else:
        ended = {"status": failure.status, "error": error, "flags": draft.flags | failure.flags}
    return msgspec.structs.replace(draft, **ended, peak_rss_bytes=failure.detail.get("peak_rss_last_seen_bytes"), **facts)


def amend(row: RunRecord, out: Path, failure: Failure) -> RunRecord:
    """Put ``failure`` into a row that the process still wrote as it ended (a hung one, after its checkpoint). Raises
    `OutputError`."""
    amended = msgspec.structs.replace(
        row, status=failure.status, error=f"{failure.error}; {row.error}", flags=row.flags | failure.flags
    )
    with _writing(out, row.run_id):
        _append_stack(out, amended, failure)
        write_terminal(out, amended)
    return amended


def logged_steps(out: Path, run_id: str, opened: bool) -> list[StepRecord]:
    """The steps that a run has logged, up to a line torn by its end. One that had not begun to write (not ``opened``) has those
    from before the resume that it was started for, and none without a checkpoint."""
    steps: list[StepRecord] = []
    if not opened and _last_checkpoint(out, run_id) is None:
        return steps
    try:
        for line in RunFiles(out, run_id).log("steps").read_bytes().splitlines():
            steps.append(decode(line, StepRecord))
    except (FileNotFoundError, *UNREADABLE):
        pass
    return steps


def _last_checkpoint(out: Path, run_id: str) -> str | None:
    """Its name; whether it is whole is seen when it is read."""
    steps = checkpoint_steps(RunFiles(out, run_id).path)
    return f"{CHECKPOINT_PREFIX}{steps[0]}" if steps else None


def _append_stack(out: Path, row: RunRecord, failure: Failure) -> None:
    """To the run's output, for people."""
    if failure.stack:
        log = Appender(RunFiles(out, row.run_id).output)
        log.append(f"{failure.error}\n{failure.stack.rstrip()}\n".encode())
        log.close()
