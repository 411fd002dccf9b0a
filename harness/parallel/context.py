"""What the ranks of a run tell each other outside of training: small objects, in host memory.

Facts of a run's row that every rank measured on its own.
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.parallel.ranks import Ranks
from harness.supervisor.failure import Failure

T = TypeVar("T")


class RanksDiffer(Exception):
    """Ranks that must be alike are not."""


class RankFailed(Exception):
    """Another rank of the run failed or went away. ``status`` is what the run's row gets; ``flags`` what the row's get
    beside the rank, see `supervise.death.Death.flags`."""

    def __init__(
        self, rank: int | None, status: str, sentence: str, traceback: str | None = None, flags: dict[str, Any] | None = None
    ) -> None:
        super().__init__(sentence)
        self.rank, self.status, self.traceback, self.flags = rank, status, traceback, flags or {}

    @classmethod
    def of(cls, death: Failure, rank: int | None = None) -> RankFailed:
        """Of a death that nobody but the others can tell."""
        return cls(rank, death.status, death.error, flags=death.flags)


class DistributedContext:
    """The ranks of a run: here the only one, which has nobody to talk to."""

    ranks = Ranks()

    def gather(self, mine: T) -> list[T]:
        """What every rank gives, by rank; all must call it."""
        return [mine]

    def broadcast(self, mine: T, source: int = 0) -> T:
        """What rank ``source`` gives; all must call it."""
        return mine

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.gather(mine))

    def same(self, what: str, mine: str) -> str:
        """``mine``, which is the same on every rank; raises `RanksDiffer` naming the first that has another."""
        told = self.gather(mine)
        other = next((rank for rank, theirs in enumerate(told) if theirs != told[0]), None)
        if other is not None:
            raise RanksDiffer(f"{what} of rank {other} are not those of rank 0 ({told[other][:12]} and {told[0][:12]})")
        return mine

    def dealt(self, items: Iterable[T]) -> Iterator[tuple[bool, T]]:
        """All ``items``, and whether each is this rank's to do: they are dealt in turn."""
        for place, item in enumerate(items):
            self.moved()
            yield place % self.ranks.world == self.ranks.rank, item

    def collected(self, mine: list[T]) -> list[T]:
        """What the ranks made of the items they were dealt, in the items' order."""
        if self.ranks.world == 1:
            return mine
        hands = self.gather([item.cpu() if isinstance(item, torch.Tensor) else item for item in mine])
        return [hands[place % len(hands)][place // len(hands)] for place in range(sum(map(len, hands)))]

    def hand_over(self, path: Path, source: int) -> bytes | None:
        """The content of rank ``source``'s file, for rank 0 to write; None where it has none, and for others."""
        mine = path.read_bytes() if self.ranks.rank == source and source and path.exists() else None
        content = self.broadcast(mine, source)
        return content if self.ranks.is_first else None

    def moved(self) -> None:
        """This rank got on: another micro-batch, another batch of an evaluation."""

    def in_turn(self, make: Callable[[], T]) -> T:
        """``make()``, on rank 0 first: what it leaves in a cache is the others'."""
        return make()

    @contextmanager
    def telling(self, if_lost: Callable[[RankFailed], None]) -> Iterator[None]:
        """Around a run: an error on one rank ends all. Where another rank failed, raises `RankFailed`; ``if_lost``
        is called in another thread, before the process ends, when this one is stuck waiting for it."""
        yield


SINGLE_PROCESS = DistributedContext()


OF_ONE_PROCESS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_rss_bytes")


def facts_of_all(team: DistributedContext, mine: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The instruments' facts (`Instruments.facts`) of all ranks: the largest GPU's memory, the GPUs' joules added up
    (on a CPU all ranks read one counter); None where a rank does not know."""
    told = team.gather(mine)
    if len(told) == 1 or not mine:
        return mine
    peaks, joules = ([theirs[name] for theirs in told] for name in ("peak_device_bytes", "energy_j"))
    return mine | {
        "peak_device_bytes": None if None in peaks else max(peaks),
        "energy_j": joules[0] if device.type == "cpu" else None if None in joules else sum(joules),
    }


def peaks_by_rank(team: DistributedContext, device: torch.device, instrument_bytes: int) -> dict[str, Any]:
    """``ranks`` for the row's ``flags``: where each rank ran and the most memory that it held, allocated bytes without
    the instruments' own. Nothing for one process, whose peaks are the row's."""
    if team.ranks.world == 1:
        return {}
    mine: dict[str, Any] = {
        "rank": team.ranks.rank,
        "host": socket.gethostname(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device.type == "cuda":
        mine |= {
            "gpu": str(torch.cuda.get_device_properties(device).uuid),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) - instrument_bytes,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    return {"ranks": team.gather(mine)}


def largest_peaks(flags: dict[str, Any]) -> dict[str, int]:
    """The rank's that comes first to run out of memory, as fields of the row; nothing where ``ranks`` is not known: then
    the row has rank 0's."""
    ranks = flags.get("ranks", [])
    return {name: max(rank[name] for rank in ranks) for name in OF_ONE_PROCESS if ranks and name in ranks[0]}
