"""Where a failure is that cannot be replayed, since no rank has the whole state: by the modules' own counters."""

from __future__ import annotations

import msgspec

from harness.parallel.team import Team
from instrument.finite import prevailing
from instrument.records import FirstNonfinite
from instrument.step_meter import Divergence
from instrument.watch.surface import innermost
from instrument.watch.taps import ModuleTaps, TapReading

DIRECTIONS = {"forward": "fwd", "loss": "fwd", "backward": "bwd"}


def located(divergence: Divergence, team: Team, taps: ModuleTaps | None) -> Divergence:
    """The divergence with the rank and the module that first showed it: the innermost that was measured in that
    step, blocks at every step, leaf modules at those of the level's cadence. All ranks call it."""
    first = divergence.first_nonfinite
    mine = _of(first, taps.mine if taps is not None else [])
    told = team.gather(mine and (mine.module, prevailing(mine.nan - mine.inf), mine.dtype))
    rank = first.rank if first.rank is not None else next((r for r, found in enumerate(told) if found is not None), None)
    found = told[rank] if rank is not None else None
    if found is not None:
        module, kind, dtype = found
        first = msgspec.structs.replace(first, rank=rank, module=module, kind=kind, dtype=dtype or None)
    where = ", ".join(
        str(part)
        for part in (f"step {first.step}", f"rank {rank}" if rank is not None else None, first.phase, first.module)
        if part
    )
    return Divergence(
        divergence.step,
        first,
        f"{where}: {first.tensor} is {first.kind}; a sharded run is not replayed, so the op is not known",
    )


def _of(first: FirstNonfinite, readings: list[TapReading]) -> TapReading | None:
    bad = [r for r in readings if r.step == first.step and r.direction == DIRECTIONS.get(first.phase) and (r.nan or r.inf)]
    return innermost(bad) if bad else None
