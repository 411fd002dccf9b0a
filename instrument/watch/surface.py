"""Where a failure shows in the counters of one step of a loop that is not ours. Torch-free.

The counters name the first module in the order of execution whose output (or, backward, gradient) is
not finite; which op inside made it, and whether an earlier infinity was harmless, only a replay
can say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from instrument.finite import prevailing, surfaced
from instrument.records import FirstNonfinite, nonfinite_name
from instrument.watch.taps import TapReading

GRADIENTS = ("backward", "unscale", "clip", "update")
"""Where gradients are measured, in order."""
COLUMNS = (
    "loss",
    "loss_scale",
    "updated",
    *(f"{name}_{what}" for name in (*GRADIENTS, "state", "param") for what in ("tensor", "nan")),
)


class Surface:
    """One step's row of `COLUMNS` and its module readings. ``states``: (parameter name, state name)."""

    def __init__(
        self,
        step: int,
        row: dict[str, float],
        readings: Sequence[TapReading],
        names: Sequence[str],
        states: Sequence[tuple[str, str]],
    ) -> None:
        self.step, self.row, self.names, self.states = step, row, names, states
        self.bad = [r for r in readings if r.nan or r.inf]
        self.updated = row["updated"] > 0

    @property
    def bad_gradients(self) -> str | None:
        """Behind which of `GRADIENTS` they were first non-finite."""
        return next((name for name in GRADIENTS if self.row[f"{name}_tensor"] >= 0), None)

    @property
    def skipped(self) -> bool:
        """Non-finite gradients that no update followed."""
        return not self.updated and self.bad_gradients is not None

    def skip_detail(self) -> dict[str, object]:
        """What a scaler's skip was about."""
        found = self._in_forward() or self._in_gradients()
        scale = self.row["loss_scale"]
        return {
            "loss_scale": scale if scale >= 0 else None,
            "phase": found.phase,
            "module": found.module,
            "tensor": found.tensor,
            "kind": found.kind,
        }

    def first_nonfinite(self) -> FirstNonfinite | None:
        """The earliest phase that shows a failure; None for a healthy step, whatever infinities died out inside."""
        loss_failed = not math.isfinite(self.row["loss"])
        if loss_failed or (self.updated and self.bad_gradients is not None):
            return self._in_forward() or (self._loss() if loss_failed else self._in_gradients())
        for kind, phase_tensor in (("state", None), ("param", "param")):
            if self.row[f"{kind}_tensor"] >= 0:
                if not self.updated and (earlier := self._in_forward()):
                    return earlier  # it was there before this step
                index = int(self.row[f"{kind}_tensor"])
                name, tensor = (self.names[index], phase_tensor) if phase_tensor else self.states[index]
                return surfaced(
                    self.step, "optimizer", tensor, prevailing(self.row[f"{kind}_nan"]), module=name.rpartition(".")[0]
                )
        return None

    def _in_forward(self) -> FirstNonfinite | None:
        forward = [r for r in self.bad if r.direction == "fwd"]
        return self._at(innermost(forward), "forward", "output") if forward else None

    def _loss(self) -> FirstNonfinite:
        return surfaced(self.step, "loss", "output", nonfinite_name(self.row["loss"]))

    def _in_gradients(self) -> FirstNonfinite:
        where = self.bad_gradients
        backward = [r for r in self.bad if r.direction == "bwd"]
        if where == "backward" and backward:
            return self._at(innermost(backward), "backward", "grad")
        name = self.names[int(self.row[f"{where}_tensor"])]
        phase = {"update": "unscale_or_clip"}.get(where, where)
        return surfaced(self.step, phase, "grad", prevailing(self.row[f"{where}_nan"]), module=name.rpartition(".")[0])

    def _at(self, reading: TapReading, phase: str, tensor: str) -> FirstNonfinite:
        return surfaced(self.step, phase, tensor, prevailing(reading.nan - reading.inf), module=reading.module)


def innermost(readings: Sequence[TapReading]) -> TapReading:
    """The first of the readings in execution order, and of modules inside one another the inner one."""
    inner = [
        r for r in readings if not any(o.module.startswith(r.module + ".") or (not r.module and o.module) for o in readings)
    ]
    return min(inner, key=lambda r: r.called)
