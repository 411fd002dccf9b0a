"""What a kind of trial yields, and the sum of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One fault, planted and got over. ``name`` finds it again (operation 17, seed 3); ``losses``: what was lost or
    wrong, each in words; ``counts`` are summed up over the trials; ``stands_for``: trials that are one here."""

    name: str
    losses: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    stands_for: int = 1


@dataclass
class Tally:
    """All trials of one kind. ``losses`` has the words of every one, behind the trial's name."""

    name: str
    what: str
    trials: int = 0
    losses: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds_s: float = 0.0

    def as_row(self) -> dict[str, Any]:
        """Plain data for ``--json`` and ``reliability.json``."""
        return {
            "name": self.name,
            "what": self.what,
            "trials": self.trials,
            "losses": len(self.losses),
            "lost": self.losses,
            "counts": dict(self.counts),
            "duration_s": round(self.seconds_s, 1),
        }


def tally(name: str, what: str, trials: Iterable[Trial], tell: Callable[[Tally], None] = lambda so_far: None) -> Tally:
    """Sum up trials as they come; ``tell`` is called behind each."""
    total, began_s = Tally(name, what), time.monotonic()
    for trial in trials:
        total.trials += trial.stands_for
        total.losses += [f"{trial.name}: {loss}" for loss in trial.losses]
        total.counts.update(trial.counts)
        total.seconds_s = time.monotonic() - began_s
        tell(total)
    return total


def share_of(count: int, share: float) -> int:
    """How many of ``count`` trials a share is: at least one."""
    return max(1, round(count * share))
