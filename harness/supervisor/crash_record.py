"""The row of a run whose process wrote none: what it had reached, and what killed it. Torch-free.

What is done behind an error: it may fail too, and must not take the error's place. Torch-free.

What a run has reached, from its step records: how far, its loss, its speed. Torch-free.

Whether something slowed a run's GPU down, in words. Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from harness.run.output_errors import output_error
from harness.supervisor.failure import Failure, sentence
from harness.supervisor.process_monitor import ProcessMonitor
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import OutputError, finished_run, write_terminal
from instrument.results.log import Appender
from instrument.results.schemas import UNREADABLE, RunRecord, StepRecord, decode

NAME = "failed_behind_the_error"


@contextmanager
def cleanup(error: BaseException | None, flags: dict[str, Any], what: str) -> Iterator[None]:
    """Around ``what`` is done when a run is over. Behind an ``error`` (a poisoned CUDA context fails at every call) an
    exception is noted in ``flags`` and goes no further; where there was none, it is an error like any other."""
    try:
        yield
    except Exception as second:
        if error is None:
            raise
        flags.setdefault(NAME, []).append(f"{what}: {sentence(second)}")


def progress_summary(steps: Sequence[StepRecord], untimed_steps: int, resumed_behind: Sequence[int]) -> dict[str, Any]:
    """Fields of a run's row."""
    finite = [s.loss for s in steps if s.loss is not None and math.isfinite(s.loss)]
    return {
        "steps_done": len(steps),
        "loss_initial": steps[0].loss if steps else None,
        "train_loss_final": statistics.fmean(finite[-max(1, len(steps) // 10) :]) if finite else None,
        "scaler_skips": sum(s.step_skipped for s in steps),
        **throughput(warm_steps(steps, untimed_steps, resumed_behind)[untimed_steps:]),
    }


def warm_steps(steps: Sequence[StepRecord], untimed_steps: int, resumed_behind: Sequence[int]) -> list[StepRecord]:
    """The steps, those without their time that come as soon behind a continuation as the untimed ones come behind the
    beginning: a process' first steps are slow."""
    cold = {step for behind in resumed_behind for step in range(behind + 1, behind + 1 + untimed_steps)}
    return [msgspec.structs.replace(s, step_time_s=None) if s.step in cold else s for s in steps]


def throughput(steps: Sequence[StepRecord]) -> dict[str, float | int | None]:
    """Rates over the timed steps: total over total, never a mean of ratios."""
    steps = [s for s in steps if s.step_time_s is not None]
    times = [s.step_time_s for s in steps]
    if not times:
        return {"timed_steps": 0}
    total_s = sum(times)
    p50, p95 = np.percentile(times, (50, 95))
    return {
        "timed_steps": len(times),
        "samples_per_s": sum(s.samples for s in steps) / total_s,
        "tokens_per_s": sum(s.tokens for s in steps) / total_s,
        "real_tokens_per_s": sum(s.real_tokens for s in steps) / total_s,
        "step_time_p50_s": float(p50),
        "step_time_p95_s": float(p95),
    }


PREFIX = "checkpoint-"
"""As in `harness.run.checkpoint_files`, which imports torch."""


def write_crash_record(
    draft: RunRecord, out: Path, vigil: ProcessMonitor, exit_code: int | None, told: Failure | None = None
) -> RunRecord:
    """Write the terminal row of the run that ``vigil`` watched, and return it. ``told``: what the process said of its end;
    otherwise ``exit_code`` and what is known speak. Where it had begun to write the run's files, a row that is there is its
    own and stands. Raises `OutputError`, and `RunClaimed` when another living process has the run by now."""
    steps = remains(out, draft.run_id, vigil.opened)
    death = told or vigil.death(exit_code, len(steps), out / "runs" / draft.run_id / "output.log")
    try:
        with _claim(out, draft.run_id, vigil.pid):
            if vigil.opened and (written := finished_run(out, draft.run_id)) is not None:
                return written
            row = with_failure(draft, death, steps, _last_checkpoint(out, draft.run_id))
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


def with_failure(draft: RunRecord, death: Failure, steps: list[StepRecord], checkpoint: str | None) -> RunRecord:
    """The draft with what was reached and how it ended. A run that died before it began to write keeps the draft's."""
    goes_on = death.flags["death"]["goes_on"] and checkpoint is not None
    error = f"{death.error}; the same command goes on from {checkpoint}" if goes_on else death.error
    resumed = draft.flags.get("resumed") or {}
    facts = progress_summary(steps, draft.config["untimed_steps"], resumed.get("behind_steps", [])) if steps else {}
    return msgspec.structs.replace(
        draft,
        status=death.status,
        error=error,
        flags=draft.flags | death.flags,
        peak_rss_bytes=death.detail.get("peak_rss_last_seen_bytes"),
        **facts,
    )


def amend(row: RunRecord, out: Path, death: Failure) -> RunRecord:
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


def _keep_stack(out: Path, row: RunRecord, death: Failure) -> None:
    """Into the run's output, for people."""
    if not death.stack:
        return
    log = Appender(out / "runs" / row.run_id / "output.log")
    log.append(f"{death.error}\n{death.stack.rstrip()}\n".encode())
    log.close()


def disturbance(record: RunRecord) -> str | None:
    """What ``flags["hardware"]`` says of heat and of other processes; None where there was nothing, or nobody knows."""
    hardware = record.flags.get("hardware")
    if not isinstance(hardware, dict):
        return None
    words = []
    if hardware.get("throttled"):
        words.append(f"the GPU slowed itself down ({', '.join(hardware.get('throttle_reasons') or [])})")
    if hardware.get("contended"):
        words.append("another process was on the GPU")
    return f"{'; '.join(words)}: the report leaves this run out of the figures of speed" if words else None
