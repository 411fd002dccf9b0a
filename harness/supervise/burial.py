"""The row of a run whose process wrote none: what it had reached, and what killed it. Torch-free."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec

from harness.claims import RunClaimed, claim
from harness.output_failure import output_error
from harness.reached import reached
from harness.run_folder import UNREADABLE, OutputError, finished_run, write_terminal
from harness.supervise.death import Death
from harness.supervise.vigil import Vigil
from instrument.log import Appender
from instrument.records import RunRecord, StepRecord, decode

PREFIX = "checkpoint-"
"""As in `harness.checkpoint`, which imports torch."""


def bury(draft: RunRecord, out: Path, vigil: Vigil, exit_code: int | None, told: Death | None = None) -> RunRecord:
    """Write the terminal row of the run that ``vigil`` watched, and return it. ``told``: what the process said of its end;
    otherwise ``exit_code`` and what is known speak. Where it had begun to write the run's files, a row that is there is its
    own and stands. Raises `OutputError`, and `RunClaimed` when another living process has the run by now."""
    steps = remains(out, draft.run_id, vigil.opened)
    death = told or vigil.death(exit_code, len(steps), out / "runs" / draft.run_id / "output.log")
    try:
        with _claim(out, draft.run_id, vigil.pid):
            if vigil.opened and (written := finished_run(out, draft.run_id)) is not None:
                return written
            row = with_death(draft, death, steps, _last_checkpoint(out, draft.run_id))
            _keep_stack(out, row, death)
            write_terminal(out, row)
    except OSError as error:
        raise output_error(error, out) or OutputError(f"cannot write {error.filename or out}: {error.strerror}") from error
    return row


def _claim(out: Path, run_id: str, pid: int | None) -> AbstractContextManager:
    """The run's claim, or none where the process that nobody can kill still holds it."""
    try:
        return claim(out, run_id)
    except RunClaimed as error:
        if error.owner.get("pid") != pid:
            raise
        return nullcontext()


def with_death(draft: RunRecord, death: Death, steps: list[StepRecord], checkpoint: str | None) -> RunRecord:
    """The draft with what was reached and how it ended. A run that died before it began to write keeps the draft's."""
    goes_on = death.flags["death"]["goes_on"] and checkpoint is not None
    error = f"{death.error}; the same command goes on from {checkpoint}" if goes_on else death.error
    resumed = draft.flags.get("resumed") or {}
    facts = reached(steps, draft.config["untimed_steps"], resumed.get("behind_steps", [])) if steps else {}
    return msgspec.structs.replace(
        draft,
        status=death.status,
        error=error,
        flags=draft.flags | death.flags,
        peak_rss_bytes=death.detail.get("peak_rss_last_seen_bytes"),
        **facts,
    )


def amend(row: RunRecord, out: Path, death: Death) -> RunRecord:
    """A row that a dying process still wrote (a hung one, behind its checkpoint), with what was done to it."""
    amended = msgspec.structs.replace(
        row, status=death.status, error=f"{death.error}; {row.error}", flags=row.flags | death.flags
    )
    _keep_stack(out, amended, death)
    write_terminal(out, amended)
    return amended


def remains(out: Path, run_id: str, opened: bool) -> list[StepRecord]:
    """The steps that a run has logged; a line torn by its death ends them. A run that had not begun to write (``opened``)
    has those of the part before, which it was to go on from, and none without a checkpoint."""
    steps: list[StepRecord] = []
    if not opened and _last_checkpoint(out, run_id) is None:
        return steps
    try:
        for line in (out / "training_logs" / f"run_{run_id}.jsonl").read_bytes().splitlines():
            steps.append(decode(line, StepRecord))
    except (FileNotFoundError, *UNREADABLE):
        pass
    return steps


def _last_checkpoint(out: Path, run_id: str) -> str | None:
    """Its name; whether it is whole is seen when it is read."""
    steps = [
        int(number)
        for path in (out / "runs" / run_id).glob(f"{PREFIX}*")
        if (number := path.name.removeprefix(PREFIX)).isdecimal()
    ]
    return f"{PREFIX}{max(steps)}" if steps else None


def _keep_stack(out: Path, row: RunRecord, death: Death) -> None:
    """Into the run's output, for people."""
    if not death.stack:
        return
    log = Appender(out / "runs" / row.run_id / "output.log")
    log.append(f"{death.error}\n{death.stack.rstrip()}\n".encode())
    log.close()
