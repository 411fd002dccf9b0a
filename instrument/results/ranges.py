"""``runs/<run_id>/activations.jsonl``: the range of every watched module, a line a module, direction and window.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from instrument.results.log import JsonlLog
from instrument.results.schemas import Record


@dataclass(frozen=True)
class TapReading:
    """One module output (``fwd``) or its gradient (``bwd``, at the scale at which backward ran) in one step.

    ``absmax`` is over finite values. ``flush_frac``: share of the nonzero values that fp16 would
    round to zero; null where only the range was taken. ``order`` is the module's place in the model,
    ``called`` its place in that step's order of execution (of several calls the last): modules are not defined in
    the order they run.
    """

    step: int
    module: str
    order: int
    direction: str
    dtype: str
    absmax: float
    nan: int
    inf: int
    flush_frac: float | None
    called: int


class ModuleRecord(Record, frozen=True, kw_only=True):
    """A module's output (``fwd``) or its gradient (``bwd``, at the scale at which backward ran) over the
    steps ``first_step`` to ``step`` in which it was measured. ``absmax``: the largest finite |x|, at step
    ``absmax_step``; ``flush_frac``: the largest share of nonzero values that fp16 would flush to zero, null
    where only the range was taken."""

    step: int
    first_step: int
    module: str
    order: int
    direction: str
    dtype: str
    absmax: float
    absmax_step: int
    nan: int
    inf: int
    flush_frac: float | None


class ModuleLog:
    """Writes a line for every module and direction in each batch of readings it is given."""

    def __init__(self, path: Path, *, fresh: bool = True) -> None:
        self._log = JsonlLog(path, fresh=fresh)

    def add(self, readings: Iterable[TapReading]) -> None:
        """Sum up and append."""
        groups: dict[tuple[int, str], list[TapReading]] = {}
        for reading in readings:
            groups.setdefault((reading.order, reading.direction), []).append(reading)
        for key in sorted(groups, key=lambda k: (k[0], k[1] == "bwd")):
            self._log.write(_summary(groups[key]))

    def close(self) -> None:
        """Sync and close."""
        self._log.close()


def _summary(group: list[TapReading]) -> ModuleRecord:
    top = max(group, key=lambda r: r.absmax)
    shares = [r.flush_frac for r in group if r.flush_frac is not None]
    return ModuleRecord(
        step=group[-1].step,
        first_step=group[0].step,
        module=top.module,
        order=top.order,
        direction=top.direction,
        dtype=top.dtype,
        absmax=top.absmax,
        absmax_step=top.step,
        nan=sum(r.nan for r in group),
        inf=sum(r.inf for r in group),
        flush_frac=max(shares, default=None),
    )
