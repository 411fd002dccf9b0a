"""A run's checkpoints while it runs: behind which steps, what goes in, what they cost."""

from __future__ import annotations

import time

from harness import checkpoint
from harness.checkpoint import Progress
from harness.checkpoint_interval import CheckpointInterval
from harness.instruments import Instruments
from harness.resume import Resumption, log_bytes, machine
from harness.run_folder import RunFolder
from harness.settings import RunSettings
from harness.signals import Stop
from harness.summary import Outcome
from harness.training import Training


class Checkpointing:
    """Writes a run's checkpoints; ``stop`` is the wish to end it with one."""

    def __init__(
        self,
        settings: RunSettings,
        training: Training,
        folder: RunFolder,
        outcome: Outcome,
        stop: Stop,
        resumption: Resumption | None,
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
                checkpoint.write(self.folder.path, self.settings.run_id, state, progress)
                self._nbytes = state.nbytes
            self.written_behind = step
            cost_s = time.perf_counter() - began_s
            self.interval.wrote(cost_s)
            self.outcome.add_time("checkpoints", cost_s)
        return f"{checkpoint.PREFIX}{self.written_behind}" if self.written_behind else None

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
            taps=instruments.left(),
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
