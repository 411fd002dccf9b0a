"""Facts of a run's row that every rank measured on its own."""

from __future__ import annotations

from typing import Any

import torch

from harness.parallel.team import Team

OF_ONE_GPU = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "peak_rss_bytes")


def facts_of_all(team: Team, mine: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The largest of what is a process' own (memory: the one that would run out first), the sum of the GPUs' joules
    (on a CPU all ranks read one counter); None where a rank does not know."""
    told = team.gather(mine)
    if len(told) == 1:
        return mine
    facts = dict(mine)
    for name in mine.keys() & OF_ONE_GPU:
        facts[name] = None if any(theirs[name] is None for theirs in told) else max(theirs[name] for theirs in told)
    if "energy_j" in mine:
        joules = [theirs["energy_j"] for theirs in told]
        facts["energy_j"] = joules[0] if device.type == "cpu" else None if None in joules else sum(joules)
    return facts
