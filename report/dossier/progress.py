"""What a person sees while a dossier is built: a bar on standard error, on a terminal only."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """A context manager; ``step`` names what begins (or, of the figures, what is done)."""

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        columns = (
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Bar(*columns, console=console, transient=True) if enabled and console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("reading", total=None)
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, steps: int) -> None:
        """How many steps are still to come."""
        if self._bar:
            self._bar.update(self._task, total=steps, completed=0)

    def step(self, what: str) -> None:
        if self._bar:
            self._bar.update(self._task, advance=1, description=what)
