"""What a person sees of one run, on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from harness.run.progress import disturbance
from harness.settings import RunSettings
from instrument.results.schemas import EvaluationRecord, EventRecord, FirstNonfinite, RunRecord, StepRecord
from instrument.terminal import STATUS_STYLES, count, rich_console

PLAIN_LINES = 10
"""How many progress lines a run prints when nobody watches a terminal."""


class CaseScreen:
    """Shows a run as it goes; use as a context manager around it."""

    def __init__(self, settings: RunSettings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.console = rich_console(stderr=True, soft_wrap=True)
        self._announced = False
        self._emptied: set[int] = set()
        self._every = max(1, settings.max_steps // PLAIN_LINES)
        self._bar = self._make_bar() if self.console.is_terminal else None

    def _make_bar(self) -> Progress:
        """A bar that fits: on a narrow terminal the description is cut, counter and time left stay."""
        wide = [BarColumn(bar_width=24)] if self.console.width >= 120 else []
        description = Column(no_wrap=True, overflow="ellipsis", max_width=self.console.width - (47 if wide else 22))
        counter = TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=12))
        return Progress(
            counter,
            *wide,
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.description}", table_column=description),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> CaseScreen:
        self._waiting = self.console.status("preparing data and model") if self._bar else None
        if self._waiting:
            self._waiting.start()
        return self

    def __exit__(self, *_) -> None:
        for shown in (self._waiting, self._bar):
            if shown:
                shown.stop()

    def show(self, record: StepRecord | EvaluationRecord | EventRecord) -> None:
        """One record of the running run."""
        self._announce()
        if isinstance(record, EvaluationRecord):
            self.console.print(f"  evaluation at step {record.step}: {describe_evaluation(record)}")
        elif isinstance(record, EventRecord) and record.kind == "resumed":
            for why in record.detail["skipped"]:
                self.console.print(f"  skipped {why}", style="yellow", markup=False)
            how = f"resumes after step {record.step}, from checkpoint-{record.step}"
            self.console.print(f"  {how if record.step else 'no checkpoint can be used: starts over'}", markup=False)
        elif isinstance(record, EventRecord) and record.kind == "clip_norm" and record.step - 1 in self._emptied:
            self._emptied.add(record.step)  # one line for steps in a row
        elif isinstance(record, EventRecord):
            if record.kind == "clip_norm":
                self._emptied.add(record.step)
            self.console.print(f"  step {record.step}: {record.kind} {record.detail}", style="yellow", markup=False)
        elif self._bar:
            self._bar.update(self._task, completed=record.step, description=describe_step(record))
        elif record.step == 1 or record.step % self._every == 0:
            self.console.print(f"  step {record.step}/{self.settings.max_steps}: {describe_step(record)}")

    def _announce(self) -> None:
        """The run's heading, once it is under way: what refuses to start is an error line alone."""
        if self._announced:
            return
        self._announced = True
        s = self.settings
        if self._waiting:
            self._waiting.stop()
        self.console.print(
            f"[bold]{s.case.id}[/] · [bold]{s.config.id}[/] · seed {s.seed} · {s.preset} preset · "
            f"{escape(s.data)} data · {escape(s.weights)} weights · "
            + (s.device if s.world == 1 else f"{s.world} ranks on {s.device} ({s.parallel})")
        )
        self.console.print(
            f"{s.batch_size} x {s.seq_len} tokens a step (micro-batches of {s.micro_batch}), "
            f"{count(s.max_steps, 'step')}, lr {s.lr:g}",
            style="dim",
        )
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=s.max_steps)

    def summary(self, record: RunRecord) -> None:
        """The end of the run in a few lines."""
        self._announce()
        if self._bar:
            self._bar.stop()
        show_summary(self.console, record, self.out)


def show_summary(console: Console, record: RunRecord, out: Path) -> None:
    """A run's row in a few lines."""
    say = console.print
    style = STATUS_STYLES.get(record.status, "yellow")
    say(
        f"[{style}]{record.status}[/] after {count(record.steps_done, 'step')}"
        + (f" in {record.flags['timings_s']['total']:.1f} s" if "total" in record.flags.get("timings_s", {}) else "")
    )
    first = record.first_nonfinite
    replayed = first is not None and first.replay is not None
    if first is not None:
        what = record.error if replayed and record.error else describe_first_nonfinite(first)
        say(f"  first non-finite value: {what}", style="red", markup=False)
    elif record.error:
        say(f"  {record.error}", style=style, markup=False)
    if replayed or "traceback" in record.flags or "stack" in record.flags.get("death", {}):
        say(f"  more: python -m harness inspect {record.run_id} --out {shlex.quote(str(out))}", style="dim", markup=False)
    if record.timed_steps:
        say(
            f"  {record.samples_per_s:,.1f} samples/s, {record.real_tokens_per_s:,.0f} real tokens/s "
            f"({record.tokens_per_s:,.0f} with padding), step p50 {record.step_time_p50_s * 1e3:.1f} ms, "
            f"p95 {record.step_time_p95_s * 1e3:.1f} ms over {count(record.timed_steps, 'step')}"
        )
    if record.stalled is not None:
        say(f"  stalled: {record.stalled}", style="yellow", markup=False)
    if (disturbed := disturbance(record)) is not None:
        say(f"  {disturbed}", style="yellow", markup=False)
    peaks = {
        "allocated on the GPU": record.peak_allocated_bytes,
        "reserved on the GPU": record.peak_reserved_bytes,
        "resident": record.peak_rss_bytes,
    }
    say("  memory: " + ", ".join(f"{peak / 1e9:.2f} GB {name}" for name, peak in peaks.items() if peak is not None))
    say(f"  {out / 'runs' / record.run_id}", style="dim", markup=False)


def describe_step(record: StepRecord) -> str:
    """Loss, gradient norm, largest logit and speed of a step."""
    rate = record.tokens / record.step_time_s if record.step_time_s else 0.0
    logit = "none finite" if record.logit_absmax is None else f"{record.logit_absmax:.3g}"
    return (
        f"loss {record.loss:.4g}  grad norm {record.grad_norm:.3g}  largest logit {logit}  "
        f"{rate:,.0f} tokens/s"
        + (f"  scale {record.loss_scale:g}" if record.loss_scale else "")
        + ("  skipped" if record.step_skipped else "")
    )


def describe_evaluation(record: EvaluationRecord) -> str:
    """The scores of an evaluation."""
    parts = [f"validation loss {record.val_loss:.4g}"]
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity:,.1f}")
    if record.f1_micro is not None:
        parts.append(f"F1 micro {record.f1_micro:.3f}, macro {record.f1_macro:.3f}")
    if record.f1_micro_tuned is not None:
        parts.append(f"micro with tuned threshold {record.f1_micro_tuned:.3f}")
    return ", ".join(parts)


def describe_first_nonfinite(first: FirstNonfinite) -> str:
    """Step, phase, place and kind."""
    place = f"{first.module}.{first.tensor}" if first.module else first.tensor
    where = f", rank {first.rank}" if first.rank is not None else ""
    where += f", micro-batch {first.microbatch}" if first.microbatch is not None else ""
    dtype = f" ({first.dtype})" if first.dtype else ""
    return f"step {first.step}{where}, {first.phase}: {place} is {first.kind}{dtype}"
