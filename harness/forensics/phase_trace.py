"""The phases of a step as slices of a profiler trace, by listening to the loop's own calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.training import Training
from instrument.trace.window import TraceWindow


class PhaseTrace:
    """Wraps a training's precision and meter for one traced step: the loop itself knows nothing of it."""

    def __init__(self, trace: TraceWindow, step: int) -> None:
        self._trace, self._step = trace, step

    def enter(self, phase: str | None) -> None:
        """End the phase that is open and begin another (None: none)."""
        self._trace.enter(phase, self._step)

    @contextmanager
    def of(self, training: Training) -> Iterator[None]:
        """Trace the phases of what ``training`` runs inside."""
        precision = training.precision
        marks = {"forward": "forward", "measure_gradients": "unscale", "clip": "clip", "update": "optimizer"}
        for name, phase in marks.items():
            setattr(precision, name, self._entering(phase, getattr(precision, name)))
        make_meter = training.meter

        def meter(*args, **kwargs):
            made = make_meter(*args, **kwargs)
            made.next_logits = self._entering("loss", made.next_logits)
            made.add_loss = self._then("backward", made.add_loss)
            made.updated = self._entering(None, made.updated)
            return made

        training.meter = meter
        try:
            yield
        finally:
            self.enter(None)
            del training.meter
            for name in marks:
                delattr(precision, name)

    def _entering(self, phase: str | None, call):
        def wrapped(*args, **kwargs):
            self.enter(phase)
            return call(*args, **kwargs)

        return wrapped

    def _then(self, phase: str, call):
        def wrapped(*args, **kwargs):
            out = call(*args, **kwargs)
            self.enter(phase)
            return out

        return wrapped
