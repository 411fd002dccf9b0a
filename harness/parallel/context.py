"""What the ranks of a run exchange outside of training, as small objects in host memory: here for a single process, which has
nobody to exchange them with (`harness.parallel.process_group` has several), and the row's facts that every rank measured."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.failure import Failure
from harness.parallel.ranks import Ranks

T = TypeVar("T")


class RanksDiffer(Exception):
    """Ranks that must be alike are not."""


class RankFailed(Exception):
    """Another rank of the run failed or is gone. ``status``, ``traceback`` and ``flags`` are for the run's row."""

    def __init__(
        self, rank: int | None, status: str, sentence: str, traceback: str | None = None, flags: dict[str, Any] | None = None
    ) -> None:
        super().__init__(sentence)
        self.rank, self.status, self.traceback, self.flags = rank, status, traceback, flags or {}

    @classmethod
    def of(cls, failure: Failure, rank: int | None = None) -> RankFailed:
        """A failure that the rank itself could not report."""
        return cls(rank, failure.status, failure.error, flags=failure.flags)


class DistributedContext:
    """The ranks of a run: here the only one."""

    ranks = Ranks()

    def gather(self, mine: T) -> list[T]:
        """The objects of all ranks, by rank; all must call it."""
        return [mine]

    def broadcast(self, mine: T, source: int = 0) -> T:
        """The object of rank ``source``; all must call it."""
        return mine

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.gather(mine))

    def same(self, what: str, mine: str) -> str:
        """``mine``, which is the same on every rank; raises `RanksDiffer` naming the first that has another."""
        values = self.gather(mine)
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise RanksDiffer(f"{what} of rank {other} are not those of rank 0 ({values[other][:12]} and {values[0][:12]})")
        return mine

    def dealt(self, items: Iterable[T]) -> Iterator[tuple[bool, T]]:
        """All ``items``, and whether each is this rank's to do: they are dealt in turn."""
        for place, item in enumerate(items):
            self.progressed()
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

    def progressed(self) -> None:
        """This rank has got to another micro-batch, or another batch of an evaluation."""

    def in_turn(self, make: Callable[[], T]) -> T:
        """``make()``, on rank 0 first: the others find what it leaves in a cache."""
        return make()

    @contextmanager
    def reporting_failures(
        self, write_row: Callable[[RankFailed], None], describe: Callable[[BaseException], Failure]
    ) -> Iterator[None]:
        """Around a run: an error on one rank, which is ``describe``d to the others, ends all. Raises `RankFailed` where another
        rank failed; where this one is stuck waiting for it, ``write_row`` is called in another thread and the process ends."""
        yield


SINGLE_PROCESS = DistributedContext()


PEAKS_OF_ONE_PROCESS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_rss_bytes")


def facts_of_all(context: DistributedContext, mine: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The instruments' facts (`Instruments.facts`) of all ranks: the largest GPU's memory, the GPUs' joules added up (on a CPU
    all ranks read one counter); None where a rank does not know."""
    facts = context.gather(mine)
    if len(facts) == 1 or not mine:
        return mine
    peaks, joules = ([one[name] for one in facts] for name in ("peak_device_bytes", "energy_j"))
    return mine | {
        "peak_device_bytes": None if None in peaks else max(peaks),
        "energy_j": joules[0] if device.type == "cpu" else None if None in joules else sum(joules),
    }


def peaks_by_rank(context: DistributedContext, device: torch.device, instrument_bytes: int) -> dict[str, Any]:
    """``ranks`` for the row's ``flags``: where each rank ran and the most memory that it held, allocated bytes without the
    instruments' own. Nothing for one process, whose peaks are the row's."""
    if context.ranks.world == 1:
        return {}
    mine: dict[str, Any] = {
        "rank": context.ranks.rank,
        "host": socket.gethostname(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device.type == "cuda":
        mine |= {
            "gpu": str(torch.cuda.get_device_properties(device).uuid),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) - instrument_bytes,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    return {"ranks": context.gather(mine)}


def largest_peaks(flags: dict[str, Any]) -> dict[str, int]:
    """Of the rank that runs out of memory first, as fields of the row; nothing where ``ranks`` is not known: then the row has
    rank 0's."""
    ranks = flags.get("ranks", [])
    return {name: max(rank[name] for rank in ranks) for name in PEAKS_OF_ONE_PROCESS if ranks and name in ranks[0]}
