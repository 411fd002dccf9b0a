"""Module readings of several processes as one: each saw its own micro-batches. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instrument.watch.taps import TapReading


def merged(ranks: Sequence[list[TapReading]]) -> list[TapReading]:
    """The largest ``absmax`` and ``flush_frac``, the sums of ``nan`` and ``inf``, by step, module and direction in
    the first rank's order."""
    if len(ranks) == 1:
        return ranks[0]
    together: dict[tuple[int, str, str], TapReading] = {}
    for reading in (reading for readings in ranks for reading in readings):
        key = reading.step, reading.module, reading.direction
        earlier = together.get(key)
        together[key] = (
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
    return list(together.values())
