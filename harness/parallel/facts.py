"""Facts of a run's row that every rank measured on its own."""

from __future__ import annotations

import resource
import socket
from typing import Any

import torch

from harness.parallel.team import Team

OF_ONE_PROCESS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_rss_bytes")


def facts_of_all(team: Team, mine: dict[str, Any], device: torch.device) -> dict[str, Any]:
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


def peaks_by_rank(team: Team, device: torch.device, instrument_bytes: int) -> dict[str, Any]:
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
