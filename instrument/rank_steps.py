"""One step as several processes measured it, each its own micro-batches, put together. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MeasuredStep:
    """A step's ring row (`instrument.step_meter.COLUMNS`), its logit statistics by micro-batch, and what the host
    knows. ``world``: how many processes it is of."""

    row: dict[str, float]
    logits: list[dict[str, Any]]
    step_time_s: float
    allocated_bytes: int | None
    world: int = 1

    def rank_of(self, microbatch: int | None) -> int | None:
        """The process that ran a micro-batch; None for a single one."""
        return microbatch // (len(self.logits) // self.world) if self.world > 1 and microbatch is not None else None


def together(measured: Sequence[MeasuredStep]) -> tuple[MeasuredStep, dict[str, int | None]]:
    """The step of all ranks from that of each, and which rank shows a non-finite gradient, state or parameter
    (``grad``, ``state``, ``param``): None where all do, as behind a sum over ranks. Micro-batches were dealt in
    equal blocks."""
    if len(measured) == 1:
        return measured[0], dict.fromkeys(("grad", "state", "param"))
    rows, per_rank = [m.row for m in measured], len(measured[0].logits)
    row = dict(rows[0])  # what comes behind the sum of gradients is everybody's
    row["loss"] = sum(r["loss"] for r in rows)
    row["loss_microbatch"] = min(
        (rank * per_rank + r["loss_microbatch"] for rank, r in enumerate(rows) if r["loss_microbatch"] >= 0), default=-1.0
    )
    found = {}
    for kind in ("grad", "state", "param"):
        index = min((r[f"{kind}_tensor"] for r in rows if r[f"{kind}_tensor"] >= 0), default=-1.0)
        showing = [rank for rank, r in enumerate(rows) if r[f"{kind}_tensor"] == index >= 0]
        row[f"{kind}_tensor"] = index
        row[f"{kind}_nan"] = sum(rows[rank][f"{kind}_nan"] for rank in showing)
        found[kind] = showing[0] if showing and len(showing) < len(rows) else None
    return MeasuredStep(
        row,
        [slot for m in measured for slot in m.logits],
        max(m.step_time_s for m in measured),
        max((m.allocated_bytes for m in measured if m.allocated_bytes is not None), default=None),
        len(measured),
    ), found
