"""What a person sees of the matrix: a live table on a terminal, a line per run elsewhere."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.matrix.plan import Shard
from harness.matrix.stability import LEGEND, cell_text, stability_table
from harness.run.progress import disturbance
from harness.settings import RunSettings
from harness.supervisor.pool import Pool, Running
from instrument.results.files import replace
from instrument.results.schemas import RunRecord
from instrument.terminal import STATUS_STYLES, count


class MatrixScreen:
    """Progress of a matrix on standard error."""

    def __init__(
        self,
        planned: list[RunSettings],
        done: dict[str, RunRecord],
        out: Path,
        jobs: int | None,
        shard: Shard | None = None,
        *,
        picture: Path | None = None,
    ) -> None:
        self.out, self.jobs, self.picture = out, jobs, picture
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.shard = f"shard {shard}: " if shard and shard.count > 1 else ""
        self.total, self.skipped = len(planned), len(done)
        self.durations_s: list[float] = []
        self.settled = 0
        self._live: Live | None = None
        self._began_s = time.monotonic()

    def plan(self, todo: list[RunSettings], unchecked: str | None = None) -> None:
        """The plan, for ``--dry-run``; ``unchecked``: what it needs and was not looked for."""
        for settings in todo:
            self.console.print(settings.run_id, soft_wrap=True)
        self.console.print(
            f"{self.shard}{count(len(todo), 'run')} to do, {self.skipped} already done in {self.out}, "
            f"{self._at_a_time()}{f'; {unchecked}' if unchecked else ''}",
            soft_wrap=True,
        )

    @contextmanager
    def live(self, pool: Pool):
        """Show ``pool`` while the block runs."""
        self._pool, self.jobs = pool, pool.jobs
        todo, done = count(self.total - self.skipped, "run"), f" ({self.skipped} already done)" if self.skipped else ""
        self.console.print(
            f"{self.shard}{todo}, {self._at_a_time()}, into {self.out}{done}"
            if self.total > self.skipped
            else f"{self.shard}nothing to do: {self._all_done()}",
            soft_wrap=True,
        )
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            yield

    @property
    def left(self) -> int:
        """Runs that have no settled row yet."""
        return self.total - self.skipped - self.settled

    def say(self, text: str) -> None:
        """A line about something out of the ordinary."""
        self.console.print(f"  {text}", soft_wrap=True)

    def _all_done(self) -> str:
        return f"{'the run is' if self.skipped == 1 else f'all {self.skipped} runs are'} done in {self.out}"

    def _at_a_time(self) -> str:
        return f"{self.jobs} at a time" if self.jobs else "as many at a time as the cluster has room for"

    def expect(self, more: list[RunSettings]) -> None:
        """Control runs joined the queue."""
        self.total += len(more)

    def tick(self) -> None:
        """Redraw the live table."""
        if self._live is not None:
            self._live.update(Group(self._running_table(), self._progress_line()), refresh=True)

    def ended(self, record: RunRecord, duration_s: float) -> None:
        """A run is over: one line."""
        self.durations_s.append(duration_s)
        self.settled += record.status != "preempted"
        *cell, status = cell_text([record])
        line = Text.assemble(
            f"{self.skipped + len(self.durations_s):>4}/{self.total}  ",
            f"{record.case:<20} {record.dtype_config:<24} s{record.seed}  ",
            (" ".join(filter(None, cell)), STATUS_STYLES.get(status, "yellow")),
            f"  {duration_s:.1f} s",
        )
        self.console.print(line, soft_wrap=True)
        for reason in (record.error if record.status in ("error", "oom", "hung") else None, disturbance(record)):
            if reason:
                self.console.print(f"          {reason}", style="yellow", soft_wrap=True)

    def finish(self, records: Iterable[RunRecord]) -> None:
        """The stability matrix, and where the rows are."""
        records = list(records)
        if records:
            table = stability_table(records, f"Stability: {count(len(records), 'run')}")
            self.console.print(table, Text(LEGEND, style="dim"))
            if self.picture is not None:
                draw(table, self.picture)
        if self.durations_s:
            self.console.print(
                f"{count(len(self.durations_s), 'run')} in {time.monotonic() - self._began_s:.0f} s; "
                f"rows in {self.out / 'results.jsonl'}",
                soft_wrap=True,
            )

    def _progress_line(self) -> Text:
        finished = self.skipped + len(self.durations_s)
        left = self._seconds_left()
        return Text(f"{finished}/{self.total} done" + (f", about {left:.0f} s left" if left is not None else ""))

    def _seconds_left(self) -> float | None:
        if not self.durations_s or not self.jobs:
            return None
        remaining = self.total - self.skipped - len(self.durations_s)
        return remaining * sum(self.durations_s) / len(self.durations_s) / self.jobs

    def _running_table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("running", "step", "loss", "largest logit", "tokens/s"):
            table.add_column(column, justify="left" if column == "running" else "right")
        for run in self._pool.running:
            table.add_row(*self._row(run))
        return table

    @staticmethod
    def _row(run: Running) -> tuple[str, ...]:
        s, step = run.settings, run.last_step
        name = f"{s.case.id} {s.config.id} s{s.seed}"
        if step is None:
            return (name, f"0/{s.max_steps}", "", "", "")
        rate = step.tokens / step.step_time_s if step.step_time_s else 0
        return (
            name,
            f"{step.step}/{s.max_steps}",
            f"{step.loss:.4g}",
            "" if step.logit_absmax is None else f"{step.logit_absmax:.3g}",
            f"{rate:,.0f}",
        )


def draw(table: Table, path: Path) -> None:
    """The table as an SVG picture that refers to nothing outside itself."""
    console = Console(record=True, width=86, file=io.StringIO(), force_terminal=True)
    console.print(table, Text(LEGEND, style="dim"))
    svg = console.export_svg(title="python -m harness matrix", unique_id="stability")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    replace(path, svg.encode())
