"""Injected faults, 50 of each kind: one row a death, and it says of what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.soak.reliability.faults import KINDS, run_faults
from tests.soak.reliability.trial import Trial, share_of

OF_EACH = 50
AT_A_TIME = 10


def deaths(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a fault; lost where the row has another status or cause, or not the steps that were made before it."""
    for kind in KINDS:
        count = share_of(OF_EACH, share)
        for first in range(0, count, AT_A_TIME):
            for fault in run_faults(kind, min(AT_A_TIME, count - first), folder / kind, first=first):
                yield Trial(f"{kind}, in {fault.phase} of step {fault.step}", [] if fault.right else [str(fault)], {kind: 1})
