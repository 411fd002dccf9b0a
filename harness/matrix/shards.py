"""``--shard i/n``: the part of a planned matrix that one of n machines runs. Torch-free.

Shards are neighbours in the planned order, cut where the tokens to train on are split evenly: the configurations
of a case and seed stay on one machine as far as they can, so that their speeds are compared on one machine, and a
machine prepares few data sets. Every machine cuts the same plan in the same places, without asking another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.settings import RunSettings, SettingsError


@dataclass(frozen=True)
class Shard:
    """The ``index``-th (from 1) of ``count`` shards."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/4``; raises `SettingsError`."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None:
            raise SettingsError(f"--shard {text!r}; allowed: i/n, such as 2/4, with i from 1 to n")
        shard = cls(int(found[1]), int(found[2]))
        if not 1 <= shard.index <= shard.count:
            raise SettingsError(
                f"--shard {text}: there is no such shard; allowed: 1/{max(1, shard.count)} to "
                f"{max(1, shard.count)}/{max(1, shard.count)}"
            )
        return shard

    def of(self, runs: Sequence[RunSettings]) -> list[RunSettings]:
        """The runs of this shard, in their order. A run belongs to the shard in which its middle token lies, so every
        run is in one shard, and a shard has its even share of all tokens to within one run's."""
        total, before, mine = sum(tokens(run) for run in runs), 0, []
        for run in runs:
            middle_doubled = 2 * before + tokens(run)
            if middle_doubled * self.count // (2 * total) == self.index - 1:
                mine.append(run)
            before += tokens(run)
        return mine

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def tokens(run: RunSettings) -> int:
    """Tokens a run trains on, padding included: what its cost goes with."""
    return run.max_steps * run.batch_size * run.seq_len


EVERYTHING = Shard(1, 1)
