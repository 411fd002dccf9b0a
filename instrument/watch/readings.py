"""Readings of modules combined: those of several processes as one, and the headroom that all of them leave to
fp16's limits. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from instrument.results.ranges import TapReading
from kernels.float_formats import FP16


def merge_readings(ranks: Sequence[list[TapReading]]) -> list[TapReading]:
    """Those of several processes as one, since each saw its own micro-batches: the largest ``absmax`` and ``flush_frac``,
    the sums of ``nan`` and ``inf``, by step, module and direction in the first rank's order."""
    if len(ranks) == 1:
        return ranks[0]
    merged: dict[tuple[int, str, str], TapReading] = {}
    for reading in (reading for readings in ranks for reading in readings):
        key = reading.step, reading.module, reading.direction
        earlier = merged.get(key)
        merged[key] = (
            reading
            if earlier is None
            else replace(
                earlier,
                absmax=max(earlier.absmax, reading.absmax),
                nan=earlier.nan + reading.nan,
                inf=earlier.inf + reading.inf,
                flush_frac=max((r.flush_frac for r in (earlier, reading) if r.flush_frac is not None), default=None),
            )
        )
    return list(merged.values())


@dataclass(frozen=True)
class Headroom:
    """One module and direction over all steps read. ``bits``: log2(65,504 / absmax), negative beyond fp16's
    range, null when all values were zero; ``flush_frac``: the largest share of nonzero values that fp16
    would flush to zero, null where only the range was taken; ``step``: of the largest value."""

    module: str
    direction: str
    absmax: float
    bits: float | None
    flush_frac: float | None
    nonfinite: int
    step: int


class HeadroomTable:
    """The running table of `Watch.headroom`."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, str], Headroom] = {}

    def add(self, readings: Iterable[TapReading]) -> None:
        """Take in readings."""
        for r in readings:
            key = (r.order, r.module, r.direction)
            old = self._rows.get(key)
            absmax, step = (r.absmax, r.step) if old is None or r.absmax > old.absmax else (old.absmax, old.step)
            shares = [known.flush_frac for known in (r, old) if known is not None and known.flush_frac is not None]
            self._rows[key] = Headroom(
                r.module,
                r.direction,
                absmax,
                FP16.headroom_bits(absmax),
                max(shares, default=None),
                r.nan + r.inf + (old.nonfinite if old else 0),
                step,
            )

    def rows(self) -> list[Headroom]:
        """In the model's order, forward before backward."""
        return [self._rows[key] for key in sorted(self._rows, key=lambda k: (k[0], k[2] == "bwd"))]
