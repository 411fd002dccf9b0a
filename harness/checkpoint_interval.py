"""How often a checkpoint is worth its time. Torch-free."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

from instrument.count import count


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
