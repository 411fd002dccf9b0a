"""How far every module's values stay from fp16's limits. Torch-free but for what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

FP16_MAX = 65_504.0


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
    """The running table behind `Watch.headroom`."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, str], Headroom] = {}

    def add(self, readings: Iterable) -> None:
        """Take in `taps.TapReading`s."""
        for r in readings:
            key = (r.order, r.module, r.direction)
            old = self._rows.get(key)
            larger = old is None or r.absmax > old.absmax
            absmax = r.absmax if larger else old.absmax
            shares = [share for share in (r.flush_frac, old and old.flush_frac) if share is not None]
            self._rows[key] = Headroom(
                r.module,
                r.direction,
                absmax,
                math.log2(FP16_MAX / absmax) if absmax else None,
                max(shares, default=None),
                r.nan + r.inf + (old.nonfinite if old else 0),
                r.step if larger else old.step,
            )

    def rows(self) -> list[Headroom]:
        """In the model's order, forward before backward."""
        return [self._rows[key] for key in sorted(self._rows, key=lambda k: (k[0], k[2] == "bwd"))]
