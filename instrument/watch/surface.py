"""Where a failure surfaced: decided from one step's row of counters, and from what else was measured in it.

Counters name the first module in the order of execution whose output (or, backward, gradient) is not finite; which op
inside made it, and whether an earlier infinity was harmless, only a replay can say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from instrument.replay.snapshot import Seen
from instrument.results.schemas import FirstNonfinite, nonfinite_name
from instrument.watch.counters import GRADIENTS, StepCounters
from instrument.watch.taps import TapReading


@dataclass(frozen=True)
class Surface:
    """One step's ``row`` (`counters.HOOKED` or `counters.REPORTED`). ``logits``: statistics of the model's own output by
    micro-batch, where the loop reports them; ``modules``: the step's readings of other outputs, where it does not. ``before``:
    the number of the step before, where there is one. ``world`` and ``rank_of``: how many processes ran the micro-batches in
    equal blocks, and which one alone shows a non-finite gradient (``backward``), ``state`` or ``param``."""

    step: int
    row: Mapping[str, float]
    counters: StepCounters
    logits: Sequence[Mapping[str, Any]] = ()
    modules: Sequence[TapReading] = ()
    before: int | None = None
    world: int = 1
    rank_of: Mapping[str, int | None] | None = None

    @property
    def updated(self) -> bool:
        """Whether the optimizer stepped: a scaler skips the update when a gradient is not finite."""
        if "updated" in self.row:
            return self.row["updated"] > 0
        return self.row["loss_scale"] < 0 or self.row["grad_nonfinite"] == 0

    @property
    def bad_gradients(self) -> str | None:
        """After which of `GRADIENTS` they were first non-finite."""
        return next((name for name in GRADIENTS if self._shows(name)), None)

    @property
    def skipped(self) -> bool:
        return not self.updated and self.bad_gradients is not None

    @property
    def emptied(self) -> bool:
        """Whether the norm that clipping used overflowed though every gradient was finite: all of them became 0."""
        finite = math.isfinite(self.row.get("grad_norm", math.nan))
        return self.updated and finite and math.isinf(self.row.get("clip_norm", 0.0))

    @property
    def between(self) -> bool:
        """Whether a parameter was spoilt before the step began, after the end of the one before."""
        return self._shows("between")

    @property
    def repaired(self) -> bool:
        """Whether gradients were not finite and were made so before the update that they entered."""
        return self.updated and self.bad_gradients is not None and not self._enters

    @property
    def _enters(self) -> bool:
        """Whether a non-finite gradient entered the update; a loop that reports repairs none."""
        return self._shows("update") if "update_tensor" in self.row else self.bad_gradients is not None

    def first_nonfinite(self) -> FirstNonfinite | None:
        """The earliest phase that shows a failure; None for a healthy step, whatever infinities died out inside."""
        if self.between:
            return self._in_parameter("between", "after", "param", self.step if self.before is None else self.before)
        if not math.isfinite(self.row["loss"]) or (self.updated and self._enters):
            return self._in_forward() or self._in_loss() or self._in_gradients()
        if not any(map(self._shows, ("state", "param", "after"))):
            return None
        earlier = self._in_logits() if self.updated else self._in_forward()  # then it was there before this step
        return earlier or self._in_clip_norm() or self._in_states() or self._in_parameters()

    def where_skipped(self) -> FirstNonfinite:
        """The earliest phase that shows why the scaler skipped the step."""
        return self._in_forward() or self._in_gradients()

    def seen(self) -> Seen:
        """What must come again in a replay, which measures no modules."""
        rows = replace(self, modules=())
        first = rows.where_skipped() if rows.skipped else rows.first_nonfinite()
        return Seen(first, self.row["loss"], self.row.get("grad_norm"), self.updated)

    def _shows(self, kind: str) -> bool:
        return self.row.get(f"{kind}_tensor", -1) >= 0

    def _in_forward(self) -> FirstNonfinite | None:
        forward = [r for r in self.modules if r.direction == "fwd" and (r.nan or r.inf)]
        return self._in_logits() or (self._in_module(forward, "forward", "output") if forward else None)

    def _in_logits(self) -> FirstNonfinite | None:
        for microbatch, slot in enumerate(self.logits):
            counts = {"nan": slot["nan"], "inf": slot["pos_inf"], "-inf": slot["neg_inf"]}
            if any(counts.values()):
                return self._of_microbatch("forward", max(counts, key=counts.__getitem__), microbatch)
        return None

    def _in_loss(self) -> FirstNonfinite | None:
        if math.isfinite(self.row["loss"]):
            return None
        microbatch = int(self.row.get("loss_microbatch", -1))
        return self._of_microbatch("loss", nonfinite_name(self.row["loss"]), None if microbatch < 0 else microbatch)

    def _of_microbatch(self, phase: str, kind: str, microbatch: int | None) -> FirstNonfinite:
        rank = microbatch // (len(self.logits) // self.world) if self.world > 1 and microbatch is not None else None
        return FirstNonfinite.surfaced(self.step, phase, "output", kind, microbatch=microbatch, rank=rank)

    def _in_gradients(self) -> FirstNonfinite:
        where = self.bad_gradients
        assert where is not None  # asked for only after bad gradients were seen
        backward = [r for r in self.modules if r.direction == "bwd" and (r.nan or r.inf)]
        if where == "backward" and backward:
            return self._in_module(backward, "backward", "grad")
        return self._in_parameter(where, "unscale_or_clip" if where == "update" else where, "grad", self.step)

    def _in_clip_norm(self) -> FirstNonfinite | None:
        norm = self.row.get("clip_norm", 0.0)
        spoilt = self._shows("param") and not math.isfinite(norm)
        return FirstNonfinite.surfaced(self.step, "clip", "grad_norm", nonfinite_name(norm)) if spoilt else None

    def _in_states(self) -> FirstNonfinite | None:
        if not self._shows("state"):
            return None
        name, state, tensor = self.counters.states[int(self.row["state_tensor"])]
        return self._in_tensor("state", "optimizer", state, name, tensor.dtype, self.step)

    def _in_parameters(self) -> FirstNonfinite:
        kind, phase = ("param", "optimizer") if self._shows("param") else ("after", "after")
        return self._in_parameter(kind, phase, "param", self.step)

    def _in_parameter(self, kind: str, phase: str, tensor: str, step: int) -> FirstNonfinite:
        index = int(self.row[f"{kind}_tensor"])
        return self._in_tensor(kind, phase, tensor, self.counters.names[index], self.counters.parameters[index].dtype, step)

    def _in_tensor(self, kind: str, phase: str, tensor: str, name: str, dtype: object, step: int) -> FirstNonfinite:
        return FirstNonfinite.surfaced(
            step,
            phase,
            tensor,
            prevailing(self.row[f"{kind}_nan"]),
            module=name.rpartition(".")[0],
            dtype=str(dtype).removeprefix("torch."),
            rank=(self.rank_of or {}).get(kind),
        )

    def _in_module(self, readings: Sequence[TapReading], phase: str, tensor: str) -> FirstNonfinite:
        reading = innermost(readings)
        return FirstNonfinite.surfaced(self.step, phase, tensor, prevailing(reading.nan - reading.inf), module=reading.module)


def innermost(readings: Sequence[TapReading]) -> TapReading:
    """The first of the readings in execution order, and of modules inside one another the inner one."""
    inner = [
        r for r in readings if not any(o.module.startswith(r.module + ".") or (not r.module and o.module) for o in readings)
    ]
    return min(inner, key=lambda r: r.called)


def prevailing(nan_surplus: float) -> str:
    """The kind of a tensor with ``nan_surplus`` more NaN than infinities."""
    return "nan" if nan_surplus > 0 else "inf"
