"""What a person sees of the matrix: a live table on a terminal, a line per run elsewhere; at the end what became of every
configuration in every case."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench_cases import CASES, DTYPE_CONFIGS
from harness.matrix.plan import Shard
from harness.run.progress import disturbance
from harness.settings import RunSettings
from harness.supervisor.pool import Pool
from instrument.results.files import replace
from instrument.results.schemas import RunRecord
from instrument.terminal import STATUS_STYLES, count, rich_console

PHASES = {"optimizer": "optim"}
LEGEND = (
    "✓ validation loss (F1 micro)   = stalled   ✗ what @step, phase of the first non-finite value   – unsupported   … stopped"
)
SIGNS = {"completed": "✓", "stalled": "=", "diverged": "✗", "unsupported": "–", "preempted": "…"}


def stability_cells(records: Iterable[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    """Runs by (configuration id, case id), in the registries' order."""
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for record in sorted(
        records, key=lambda record: (*_place(record.dtype_config, DTYPE_CONFIGS), *_place(record.case, CASES))
    ):
        cells.setdefault((record.dtype_config, record.case), []).append(record)
    return cells


def _place(name: str, registry: dict) -> tuple[int, str]:
    return list(registry).index(name) if name in registry else len(registry), name


def cell_text(runs: list[RunRecord]) -> tuple[str, str, str]:
    """(outcome, detail, status that decides the colour) of one cell; several seeds read ``✗ 2/3 …``,
    and completed ones show the seed in the middle."""
    in_order = sorted(runs, key=lambda run: (run.val_loss is None, run.val_loss))
    bad = [run for run in runs if _end(run) not in ("completed", "unsupported")]
    worst = min(
        bad,
        key=lambda run: (_end(run) == "preempted", _end(run) == "stalled", run.status != "diverged"),
        default=in_order[(len(runs) - 1) // 2],
    )
    end = _end(worst)
    same = sum(_end(run) == end for run in runs)
    share = f"{same}/{len(runs)} " if len(runs) > 1 else ""
    outcome, detail = _outcome(worst)
    return f"{SIGNS.get(end, '!')} {share}{outcome}", detail, end


def _end(run: RunRecord) -> str:
    """A run's status, ``stalled`` where it completed and stood still."""
    return "stalled" if run.stalled is not None else run.status


def _outcome(run: RunRecord) -> tuple[str, str]:
    """A run's end in two short pieces."""
    if run.status == "completed":
        loss = f"{run.val_loss:.3g}" if run.val_loss is not None else "done"
        return loss, "stalled" if run.stalled else f"F1 {run.f1_micro:.2f}" if run.f1_micro is not None else ""
    if run.status == "diverged":
        what, phase = (first.kind, first.phase) if (first := run.first_nonfinite) else ("loss up", "")
        return f"{what} @{run.divergence_step}", PHASES.get(phase, phase)
    return run.status, ""


def stability_table(records: Iterable[RunRecord], title: str) -> Table:
    """The matrix as a rich table, within 80 columns for the six cases: configurations down, cases across."""
    cells = stability_cells(records)
    cases = sorted({case for _, case in cells}, key=lambda case: _place(case, CASES))
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for case in cases:
        arch, _, task = case.partition("_")
        table.add_column(overflow="fold", header=f"{arch}\n{task.replace('_cls', '').replace('_', ' ')}")
    for config in dict.fromkeys(config for config, _ in cells):
        row = []
        for case in cases:
            *lines, status = cell_text(cells[config, case]) if (config, case) in cells else ("", "", "missing")
            row.append(Text("\n".join(filter(None, lines)), style=STATUS_STYLES.get(status, "yellow")))
        table.add_row(config, *row)
    return table


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
        self.console = rich_console(stderr=True, markup=False)
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
        done = f" ({self.skipped} already done)" if self.skipped else ""
        line = f"{count(self.total - self.skipped, 'run')}, {self._at_a_time()}, into {self.out}{done}"
        if self.total == self.skipped:
            line = f"nothing to do: {'the run is' if self.skipped == 1 else f'all {self.skipped} runs are'} done in {self.out}"
        self.console.print(f"{self.shard}{line}", soft_wrap=True)
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
        finished, left = self.skipped + len(self.durations_s), ""
        if self.durations_s and self.jobs:
            left = f", about {(self.total - finished) * fmean(self.durations_s) / self.jobs:.0f} s left"
        return Text(f"{finished}/{self.total} done{left}")

    def _running_table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("running", "step", "loss", "largest logit", "tokens/s"):
            table.add_column(column, justify="left" if column == "running" else "right")
        for run in self._pool.running:
            s, step = run.settings, run.last_step
            cells = [f"{s.case.id} {s.config.id} s{s.seed}", f"{step.step if step else 0}/{s.max_steps}"]
            if step is not None:
                cells += [f"{step.loss:.4g}", "" if step.logit_absmax is None else f"{step.logit_absmax:.3g}"]
                cells.append(f"{step.tokens / step.step_time_s if step.step_time_s else 0:,.0f}")
            table.add_row(*cells)
        return table


def draw(table: Table, path: Path) -> None:
    """The table as an SVG picture that refers to nothing outside itself."""
    console = Console(record=True, width=86, file=io.StringIO(), force_terminal=True)
    console.print(table, Text(LEGEND, style="dim"))
    svg = console.export_svg(title="python -m harness matrix", unique_id="stability")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    replace(path, svg.encode())
