"""A run's checkpoints while it runs: behind which steps, what goes in, what they cost.

How often a checkpoint is worth its time. Torch-free.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

from harness.run import checkpoint_files
from harness.run.checkpoint_files import Progress
from harness.run.instruments import Instruments
from harness.run.outcome import Outcome
from harness.run.resume import ResumeState, log_bytes, machine
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.training import Training
from instrument.results.folder import RunFolder
from instrument.terminal import count


def young_daly_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints of ``cost_s`` each that lose the least time on a machine that lasts
    ``mtbf_s`` seconds on average: sqrt(2 * cost * mtbf) (Young 1974, doi:10.1145/361147.361115; Daly 2006,
    doi:10.1016/j.future.2004.11.016). It holds for a cost far below the mtbf; never less than the cost itself."""
    return max(cost_s, math.sqrt(2 * cost_s * mtbf_s))


class CheckpointInterval:
    """Says behind which step a checkpoint is due: every ``every_steps``; or ``mtbf_s`` by `young_daly_s` from the
    costs so far, the first one behind ``first_step``, to measure it; or never."""

    def __init__(
        self, *, every_steps: int, mtbf_s: float | None, first_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.every_steps, self.mtbf_s, self.first_step = every_steps, mtbf_s, first_step
        self.costs_s: list[float] = []
        self._clock = clock
        self._since_s = clock()

    def due(self, step: int) -> bool:
        """Whether one should be written behind ``step``."""
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
        """In words, for the record."""
        if self.mtbf_s is not None:
            return f"sqrt(2 x cost x {self.mtbf_s:g} s), Young/Daly"
        return f"every {count(self.every_steps, 'step')}" if self.every_steps else "on a signal"


class Checkpointing:
    """Writes a run's checkpoints; ``stop`` is the wish to end it with one."""

    def __init__(
        self,
        settings: RunSettings,
        training: Training,
        folder: RunFolder,
        outcome: Outcome,
        stop: Stop,
        resumption: ResumeState | None,
    ) -> None:
        self.settings, self.training, self.folder, self.outcome, self.stop = settings, training, folder, outcome, stop
        self.written_behind = resumption.step if resumption else 0
        self.interval = CheckpointInterval(
            every_steps=settings.checkpoint_every,
            mtbf_s=settings.mtbf_s,
            first_step=self.written_behind + max(1, settings.untimed_steps),
        )
        self._nbytes = 0

    def cut(self, step: int) -> bool:
        """Whether the records up to ``step`` must be read now: what is stored is of one step."""
        return self.stop.requested is not None or self.due(step)

    def due(self, step: int) -> bool:
        """Whether one should be written behind ``step``: the last has its evaluation next, and then a row."""
        return step < self.settings.max_steps and self.interval.due(step)

    def write(self, instruments: Instruments | None) -> str | None:
        """Write one behind the last step that was read and return its name, or None where no step was made since
        the last one. Raises OSError."""
        step, began_s = len(self.outcome.steps), time.perf_counter()
        if step > self.written_behind and instruments is not None:
            state, progress = self.training.state(step), self._progress(instruments)
            if state is not None:
                checkpoint_files.write(self.folder.path, self.settings.run_id, state, progress)
                self._nbytes = state.nbytes
            self.written_behind = step
            cost_s = time.perf_counter() - began_s
            self.interval.wrote(cost_s)
            self.outcome.add_time("checkpoints", cost_s)
        return f"{checkpoint_files.PREFIX}{self.written_behind}" if self.written_behind else None

    def _progress(self, instruments: Instruments) -> Progress:
        outcome, s = self.outcome, self.settings
        return Progress(
            init_sha256=outcome.facts["init_sha256"],
            data_sha256=outcome.facts["data_sha256"],
            environment=machine(s),
            instrument=s.instrument,
            log_bytes=log_bytes(self.folder.out, s.run_id),
            timings_s=outcome.timings_now_s(),
            resumed_behind=outcome.resumed_behind,
            taps=instruments.state_dict(),
        )

    def flags(self) -> dict[str, object]:
        """For the record's ``flags``: nothing when none was written."""
        costs_s = self.interval.costs_s
        if not costs_s:
            return {}
        return {
            "checkpoints": {
                "written": len(costs_s),
                "bytes": self._nbytes,
                "rule": self.interval.rule,
                "cost_s": round(sum(costs_s) / len(costs_s), 4),
                "interval_s": self.interval.interval_s,
            }
        }
