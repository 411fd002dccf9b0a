"""What an exception did to a run, from inside its process: cause, place, and memory where that ran out."""

from __future__ import annotations

import resource
from dataclasses import replace

from harness.supervise.death import Death, of_exception
from harness.supervise.where import where_of


def fault_of(error: BaseException, device: str | None = None) -> Death:
    """``device``: the run's (``cpu``, ``cuda``), None where it is not known yet. Never raises."""
    death = of_exception(
        error, **where_of(error), peak_rss_last_seen_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    if death.status != "oom" or device is None:
        return death
    import torch

    from instrument.memory_exhausted import memory_when_it_ran_out

    return replace(death, memory=memory_when_it_ran_out(death.error, torch.device(device), death.cause))
