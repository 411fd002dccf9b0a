"""``runs/<run_id>/checkpoint-<step>/``: everything a run needs to resume after ``step``; when one is written, and its cost.

The state is written as a failed run's snapshot is (`harness.forensics.stored`): safetensors, JSON and checksums, never a
pickle. A folder appears under its name only when it is whole and on the disk; two are kept.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from harness.forensics.stored import SnapshotError, read_folder, write_state
from harness.run.progress import CHECKPOINT_PREFIX, checkpoint_steps
from harness.settings import RunSettings
from instrument.environment import capture
from instrument.replay.snapshot import NamedState
from instrument.results.files import placing_folder, remove_folder, require_there, sweep, sync_file
from instrument.results.folder import OutputError, RunFolder, log_paths
from instrument.results.layout import RunFiles
from instrument.terminal import count

if TYPE_CHECKING:
    from harness.run.instruments import Instruments
    from harness.run.outcome import Outcome
    from harness.run.signals import Stop
    from harness.training import Training

KEPT = 2
SAME_MACHINE = {"cpu": ("torch_version", "cpu", "cpu_capability"), "cuda": ("torch_version", "gpu")}
"""What must be as it was when the checkpoint was written: a row has one environment, and its numbers with it."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the reason is the message."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a run was, beside its state. ``log_bytes``: sizes of its logs, by their paths in the results folder;
    ``resumed_after``: the steps after which it was resumed before; ``taps``: the module statistics of an open window."""

    init_sha256: str
    data_sha256: str
    environment: dict[str, Any]
    instrument: str
    log_bytes: dict[str, int]
    timings_s: dict[str, float]
    resumed_after: list[int] = msgspec.field(name="resumed_behind")
    taps: dict[str, Any] | None


def write_checkpoint(run_folder: Path, run_id: str, state: NamedState, progress: Progress) -> Path:
    """Write the state's checkpoint and drop what is older than the last two. Raises `OSError` (a full disk, a run's folder that
    is gone: it is not made again), and then nothing has changed."""
    require_there(run_folder)
    folder = run_folder / f"{CHECKPOINT_PREFIX}{state.step}"
    sweep(run_folder)
    with placing_folder(folder) as writing:
        write_state(state, writing, run_id, msgspec.to_builtins(progress))
    for step in checkpoint_steps(run_folder)[KEPT:]:
        remove_folder(run_folder / f"{CHECKPOINT_PREFIX}{step}")
    return folder


def read_checkpoint(run_folder: Path, run_id: str, step: int) -> tuple[NamedState, Progress]:
    """Its state, the tensors mapped and not loaded, and the progress; raises `CheckpointError` when it is damaged or another
    run's."""
    try:
        state, more = read_folder(run_folder / f"{CHECKPOINT_PREFIX}{step}", run_id)
        if state.step != step:
            raise CheckpointError(f"it holds the state after step {state.step}")
        return state, msgspec.convert(more, Progress)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except (OSError, SnapshotError, msgspec.ValidationError) as error:
        raise CheckpointError(str(error)) from error


def discard(out: Path, run_id: str, keep: int | None = None) -> None:
    """Remove what a run could resume from, or what is later than step ``keep``; raises `OutputError`."""
    run_folder = RunFiles(out, run_id).path
    try:
        sweep(run_folder)
        for step in checkpoint_steps(run_folder):
            if keep is None or step > keep:
                remove_folder(run_folder / f"{CHECKPOINT_PREFIX}{step}")
    except OSError as error:
        raise OutputError.of(error, out) from error


def machine_facts(settings: RunSettings) -> dict[str, Any]:
    """What of this machine a checkpoint depends on."""
    here = capture(torch.device(settings.device))
    return {name: here.get(name) for name in SAME_MACHINE[settings.device]}


def young_daly_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints of ``cost_s`` each that lose the least time on a machine that lasts
    ``mtbf_s`` seconds on average: sqrt(2 * cost * mtbf) (Young 1974, doi:10.1145/361147.361115; Daly 2006,
    doi:10.1016/j.future.2004.11.016). It holds for a cost far below the mtbf; never less than the cost itself."""
    return max(cost_s, math.sqrt(2 * cost_s * mtbf_s))


class CheckpointInterval:
    """After which steps a checkpoint is due: every ``every_steps``; or ``mtbf_s`` by `young_daly_s` from the costs so far, the
    first one after ``first_step``, to measure it; or never."""

    def __init__(
        self, *, every_steps: int, mtbf_s: float | None, first_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.every_steps, self.mtbf_s, self.first_step = every_steps, mtbf_s, first_step
        self.costs_s: list[float] = []
        self._clock = clock
        self._since_s = clock()

    def due(self, step: int) -> bool:
        """Whether one should be written after ``step``."""
        if self.mtbf_s is None:
            return self.every_steps > 0 and step % self.every_steps == 0
        if self.interval_s is None:
            return step >= self.first_step
        return self._clock() - self._since_s >= self.interval_s

    def wrote(self, cost_s: float) -> None:
        """A checkpoint was written, in ``cost_s`` seconds."""
        self.costs_s.append(cost_s)
        self._since_s = self._clock()

    @property
    def interval_s(self) -> float | None:
        """Seconds between two checkpoints; None unless an mtbf is given and a cost measured."""
        if self.mtbf_s is None or not self.costs_s:
            return None
        return young_daly_s(statistics.fmean(self.costs_s), self.mtbf_s)

    @property
    def rule(self) -> str:
        """For the record, in words."""
        if self.mtbf_s is not None:
            return f"sqrt(2 x cost x {self.mtbf_s:g} s), Young/Daly"
        return f"every {count(self.every_steps, 'step')}" if self.every_steps else "on a signal"


class Checkpointing:
    """Writes a run's checkpoints. ``resumed_after``: the step of the checkpoint that it resumed from, or 0."""

    def __init__(
        self, settings: RunSettings, training: Training, folder: RunFolder, outcome: Outcome, stop: Stop, resumed_after: int = 0
    ) -> None:
        self.settings, self.training, self.folder, self.outcome, self.stop = settings, training, folder, outcome, stop
        self.last_step = resumed_after
        self.interval = CheckpointInterval(
            every_steps=settings.checkpoint_every,
            mtbf_s=settings.mtbf_s,
            first_step=self.last_step + max(1, settings.untimed_steps),
        )
        self._nbytes = 0

    def cut(self, step: int) -> bool:
        """Whether the meter must be read after ``step``, since its state may be stored."""
        return self.stop.requested is not None or self.due(step)

    def due(self, step: int) -> bool:
        """Whether one should be written after ``step``; not after the last, which only its evaluation and the row follow."""
        return step < self.settings.max_steps and self.interval.due(step)

    def write(self, instruments: Instruments | None) -> str | None:
        """Write one of the last step that was read and return its name, or None where no step was made since the last one.
        Raises OSError."""
        step, began_s = len(self.outcome.steps), time.perf_counter()
        if step > self.last_step and instruments is not None:
            state, s, outcome = self.training.state(step), self.settings, self.outcome
            progress = Progress(
                init_sha256=outcome.facts["init_sha256"],
                data_sha256=outcome.facts["data_sha256"],
                environment=machine_facts(s),
                instrument=s.instrument,
                log_bytes=self._log_bytes(),
                timings_s=outcome.timings_now_s(),
                resumed_after=outcome.resumed_after,
                taps=instruments.state_dict(),  # which all ranks call
            )
            if state is not None:
                write_checkpoint(self.folder.path, s.run_id, state, progress)
                self._nbytes = state.nbytes
            self.last_step = step
            cost_s = time.perf_counter() - began_s
            self.interval.wrote(cost_s)
            outcome.add_time("checkpoints", cost_s)
        return f"{CHECKPOINT_PREFIX}{self.last_step}" if self.last_step else None

    def _log_bytes(self) -> dict[str, int]:
        """How long the logs are now, down to the disk."""
        sizes = {}
        for name in log_paths(self.settings.run_id).values():
            if (path := self.folder.out / name).exists():  # without instruments there is no activations.jsonl
                sync_file(path)
                sizes[name] = path.stat().st_size
        return sizes

    def flags(self) -> dict[str, object]:
        """For the record's ``flags``: nothing when none was written."""
        costs_s, interval = self.interval.costs_s, self.interval
        if not costs_s:
            return {}
        size = {"written": len(costs_s), "bytes": self._nbytes, "rule": interval.rule}
        return {"checkpoints": size | {"cost_s": round(statistics.fmean(costs_s), 4), "interval_s": interval.interval_s}}
