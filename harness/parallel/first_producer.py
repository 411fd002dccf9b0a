"""Every rank replays its own micro-batches of a failed step; which of what they found came first."""

from __future__ import annotations

import msgspec

from harness.parallel.share import Share
from instrument.records import FirstNonfinite
from instrument.replay.op_schema import SUM_OVER_RANKS

BEHIND_THE_LOSS = ("forward", "loss")


def of_this_rank(found: FirstNonfinite, share: Share, micro_batches: int) -> FirstNonfinite:
    """A rank's own finding with its rank, its micro-batch counted through the whole step. A sum over ranks that
    overflows is nobody's: each one's gradients were finite."""
    if share.team.ranks.world == 1:
        return found
    place = found.microbatch
    return msgspec.structs.replace(
        found,
        rank=None if found.op == SUM_OVER_RANKS else share.team.ranks.rank,
        microbatch=None if found.op == SUM_OVER_RANKS or place is None else share.first(micro_batches) + place,
    )


def first_of_all(share: Share, mine: FirstNonfinite | None) -> tuple[int, FirstNonfinite] | None:
    """The rank whose finding came first and that finding, on every rank; None where there is none. In the order in
    which one process would have blamed them: what made a loss non-finite, by micro-batch, before gradients, these
    before what comes behind the sum; that sum itself last, since it only passes on what a rank put in."""
    told = share.team.gather(mine)
    candidates = [(_order(first), rank) for rank, first in enumerate(told) if first is not None]
    if not candidates:
        return None
    _, rank = min(candidates)
    first = told[rank]
    if len(told) > 1:
        alike = [r for r, other in enumerate(told) if other is not None and _what(other) == _what(first)]
        first = msgspec.structs.replace(first, replay=(first.replay or {}) | {"ranks": alike})
    return rank, first


def _order(first: FirstNonfinite) -> tuple[int, int]:
    stage = 3 if first.op == SUM_OVER_RANKS else 0 if first.phase in BEHIND_THE_LOSS else 1 if first.phase == "backward" else 2
    return stage, first.microbatch or 0


def _what(first: FirstNonfinite) -> tuple:
    return first.phase, first.module, first.op, first.tensor, first.kind
