"""How the trials go, on standard error: a line that changes on a terminal, one a minute elsewhere, and a row a kind."""

from __future__ import annotations

import time

from rich.padding import Padding
from rich.status import Status
from rich.text import Text

from harness.overhead.figure import CONSOLE
from instrument.terminal import count
from tests.soak.reliability.trial import Tally

MOST_LOSSES = 10
SECONDS_BETWEEN_WORDS = 60.0
"""Where nobody watches a terminal."""
WIDTHS = (24, 9, 7, 9)


class Screen:
    """A context around the trials."""

    def __init__(self) -> None:
        self._status: Status | None = CONSOLE.status("") if CONSOLE.is_terminal else None
        self._told_s = time.monotonic()

    def __enter__(self) -> Screen:
        CONSOLE.print(_row("bench reliability", "trials", "lost", "seconds"), style="bold", markup=False)
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        if self._status:
            self._status.stop()

    def tell(self, so_far: Tally) -> None:
        """A trial is over."""
        words = f"{so_far.name}: {count(so_far.trials, 'trial')}, {len(so_far.losses):,} lost, {so_far.seconds_s:.0f} s"
        if self._status:
            self._status.update(words)
        elif time.monotonic() - self._told_s > SECONDS_BETWEEN_WORDS:
            CONSOLE.print(f"  {words}", style="dim", markup=False)
            self._told_s = time.monotonic()

    def done(self, tally: Tally) -> None:
        """A kind is over: its row, and what was lost."""
        CONSOLE.print(
            _row(tally.name, f"{tally.trials:,}", f"{len(tally.losses):,}", f"{tally.seconds_s:.0f}"),
            style="red" if tally.losses else None,
            markup=False,
        )
        _below(tally.what)
        if tally.counts:
            _below(", ".join(f"{n:,} {name}" for name, n in tally.counts.items()))
        for loss in tally.losses[:MOST_LOSSES]:
            CONSOLE.print(f"  lost: {loss}", markup=False)
        if len(tally.losses) > MOST_LOSSES:
            CONSOLE.print(f"  and {len(tally.losses) - MOST_LOSSES:,} more")


def _row(name: str, *numbers: str) -> str:
    return f"{name:<{WIDTHS[0]}}" + "".join(f"{number:>{width}}" for number, width in zip(numbers, WIDTHS[1:], strict=True))


def _below(words: str) -> None:
    """Beneath a row; words take as many lines as the terminal's width asks for."""
    CONSOLE.print(Padding(Text(words, style="dim"), (0, 0, 0, 2), expand=False))
