"""Which rank, micro-batch and module of a step that failed on several ranks came first: from the ranks' own replays, or by the
modules' counters where no rank has the whole state that a replay needs."""

from __future__ import annotations

from operator import attrgetter

import msgspec

from harness.parallel.context import DistributedContext
from harness.parallel.strategy import ParallelStrategy
from instrument.replay.ops import SUM_OVER_RANKS
from instrument.results.schemas import FirstNonfinite
from instrument.watch.meter import Divergence
from instrument.watch.surface import innermost, prevailing
from instrument.watch.taps import ModuleTaps

MICROBATCH_PHASES = ("forward", "loss", "backward")
"""In their order."""


def of_this_rank(found: FirstNonfinite, strategy: ParallelStrategy, micro_batches: int) -> FirstNonfinite:
    """A rank's own finding with its rank, its micro-batch counted through the whole step. A sum over ranks that
    overflows is nobody's: each one's gradients were finite."""
    if strategy.context.ranks.world == 1:
        return found
    place = found.microbatch
    return msgspec.structs.replace(
        found,
        rank=None if found.op == SUM_OVER_RANKS else strategy.context.ranks.rank,
        microbatch=None if found.op == SUM_OVER_RANKS or place is None else strategy.first(micro_batches) + place,
    )


def first_of_all(strategy: ParallelStrategy, mine: FirstNonfinite | None) -> tuple[int, FirstNonfinite] | None:
    """The rank whose finding came first and that finding, on every rank; None where there is none. In the order in
    which one process would have run them: by micro-batch and, within one, forward pass, loss, backward pass; then what
    comes after the sum of gradients; that sum itself last, since it only passes on what a rank put in."""
    findings = strategy.context.gather(mine)
    candidates = [(_order(first), rank) for rank, first in enumerate(findings) if first is not None]
    if not candidates:
        return None
    _, rank = min(candidates)
    first = findings[rank]
    if len(findings) > 1:
        same = attrgetter("phase", "module", "op", "tensor", "kind")
        alike = [r for r, other in enumerate(findings) if other is not None and same(other) == same(first)]
        first = msgspec.structs.replace(first, replay=(first.replay or {}) | {"ranks": alike})
    return rank, first


def _order(first: FirstNonfinite) -> tuple[int, int, int]:
    in_microbatch = first.phase in MICROBATCH_PHASES and first.op != SUM_OVER_RANKS
    stage = 0 if in_microbatch else 2 if first.op == SUM_OVER_RANKS else 1
    return stage, first.microbatch or 0, MICROBATCH_PHASES.index(first.phase) if in_microbatch else 0


DIRECTIONS = {"forward": "fwd", "loss": "fwd", "backward": "bwd"}


def located(divergence: Divergence, context: DistributedContext, taps: ModuleTaps | None) -> Divergence:
    """The divergence with the rank and the module that first showed it: the innermost that was measured in that
    step, blocks at every step, leaf modules at those of the level's cadence. All ranks call it."""
    first, readings = divergence.first_nonfinite, taps.mine if taps is not None else []
    direction = DIRECTIONS.get(first.phase)
    bad = [r for r in readings if r.step == first.step and r.direction == direction and (r.nan or r.inf)]
    mine = innermost(bad) if bad else None
    findings = context.gather(mine and (mine.module, prevailing(mine.nan - mine.inf), mine.dtype))
    rank = first.rank if first.rank is not None else next((r for r, found in enumerate(findings) if found is not None), None)
    found = findings[rank] if rank is not None else None
    if found is not None:
        module, kind, dtype = found
        first = msgspec.structs.replace(first, rank=rank, module=module, kind=kind, dtype=dtype or None)
    places = (f"step {first.step}", f"rank {rank}" if rank is not None else None, first.phase, first.module)
    what = f"{first.tensor} is {first.kind}; a sharded run is not replayed, so the op is not known"
    return Divergence(divergence.step, first, f"{', '.join(filter(None, places))}: {what}")
