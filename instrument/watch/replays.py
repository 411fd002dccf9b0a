"""Running steps of somebody else's loop again, and leaving the run as if that had not happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from instrument.replay.examine import Examination, examine
from instrument.replay.recorder import OpRecorder
from instrument.replay.snapshot import Snapshot
from instrument.watch.step_counters import COLUMNS, StepRow

CUDA_TOLERANCE = 1e-3
"""Relative difference of a counter that still counts as the same on CUDA; on a CPU they must be equal."""
ATTEMPTS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Replayed:
    """``matched``: the step's counters came out as the first time; ``found``: its culprit, None where the step
    stayed finite; ``error``: what the step function raised."""

    found: Examination | None
    matched: bool
    from_step: int
    error: str | None = None

    def words(self) -> dict[str, object]:
        """What a record says of a replay that explains nothing."""
        return {"matched": False, "from_step": self.from_step} | ({"error": self.error} if self.error else {})


class Replays:
    """The last snapshot, the numbers of the steps completed since (they may start anywhere, skip and repeat), and
    the function that runs one of them again. ``row`` measures the step's counters once more for `Replayed.matched`."""

    def __init__(
        self,
        run_step: Callable[[int], object],
        row: StepRow,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        every: int,
    ) -> None:
        self._run_step, self._row, self._parts, self._every = run_step, row, (model, optimizer, scaler), every
        self._snapshot: Snapshot | None = None
        self._since: list[int] = []
        self._gap = False
        self.recorder: OpRecorder | None = None

    @property
    def due(self) -> bool:
        """Whether the next step needs a new snapshot; what is pending must be read before, from the old one."""
        return self._snapshot is None or self._gap or len(self._since) >= self._every

    def keep(self, step: int) -> None:
        """Take the state before ``step``."""
        self._snapshot, self._since, self._gap = Snapshot(step - 1, *self._parts), [], False

    def completed(self, step: int) -> None:
        """``step`` is over."""
        self._since.append(step)

    def interrupted(self) -> None:
        """A step raised: from before it, nobody can run to behind it."""
        self._gap = True

    def again(self, steps_ago: int, values: Sequence[float]) -> Replayed:
        """The step that was completed ``steps_ago`` steps ago (1: the last one), whose row was ``values``."""
        *earlier, step = self._since[: len(self._since) - steps_ago + 1]
        now = Snapshot(self._since[-1], *self._parts)
        try:
            for _ in range(ATTEMPTS[self._row.device.type]):
                before, row = self._count(earlier, step)
                if matched := _alike(row, values, 0.0 if self._row.device.type == "cpu" else CUDA_TOLERANCE):
                    break
            found = examine(step, self._recorded, before, *self._parts)
            return Replayed(found, matched and found is not None, self._snapshot.step)
        except Exception as error:  # the loop's own code failed outside of its loop: that must not end the run
            return Replayed(None, False, self._snapshot.step, f"{type(error).__name__}: {error}")
        finally:
            self.recorder = None
            self._row.drop()
            now.restore()

    def _count(self, earlier: Sequence[int], step: int) -> tuple[Snapshot, list[float]]:
        """From the snapshot to the step: the state before it, and its row."""
        self._snapshot.restore()
        for number in earlier:
            self._run_step(number)
        before = Snapshot(step - 1, *self._parts) if earlier else self._snapshot
        self._row.begin()
        self._run_step(step)
        return before, self._row.end().tolist()

    def _recorded(self, step: int, recorder: OpRecorder | None) -> None:
        self.recorder = recorder
        self._run_step(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that the loop names, for the recorder."""
        if self.recorder is None:
            yield
            return
        with self.recorder.phase(name):
            yield


def _alike(row: Sequence[float], values: Sequence[float], tolerance: float) -> bool:
    return len(row) == len(COLUMNS) and all(
        a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance * max(abs(a), abs(b))
        for a, b in zip(row, values, strict=True)
    )
