"""The wish to stop, of several ranks: heard by any, heeded by all behind the same step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from harness.parallel.team import Team
from harness.signals import Item, Stop, Stopped


class StopTogether(Stop):
    """As `Stop`, but asked about at the log points only, where the ranks meet: ``requested`` stays None, so that no
    rank leaves its step at another place than the others."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self._team = team
        self._heard_here: str | None = None

    @property
    def heard(self) -> str | None:
        return self._heard_here

    def request(self, who: str) -> None:
        self._heard_here = self._heard_here or who

    def check(self) -> None:
        """Raise `Stopped` on every rank when any was asked to; all must call it."""
        heard = next((who for who in self._team.gather(self._heard_here) if who), None)
        if heard is not None:
            raise Stopped(heard)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``: an evaluation is finished first."""
        yield from items
