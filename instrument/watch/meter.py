"""The watch of a loop that reports: what the harness' loop hands over of every step, and the records made of it.

The loop hands over tensors as it makes them (losses, logits, gradients, the update). Counters stay on the device and are
read once per log window (`instrument.watch.counters`); where a failure surfaced is decided as in any other loop
(`instrument.watch.surface`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from instrument.replay.recorder import OpRecorder
from instrument.results.measurements import TapReading
from instrument.results.schemas import EventRecord, FirstNonfinite, StepRecord, nonfinite_name
from instrument.watch.counters import REPORTED, StepCounters
from instrument.watch.surface import Surface
from instrument.watch.taps import ModuleTaps
from kernels import LogitStats, TensorStats


class StepClock:
    """Seconds of one step: CUDA events, read after the sync of the log point, or the host clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._stop.record()
        else:
            self._stop = time.perf_counter()

    def seconds(self) -> float:
        return self._start.elapsed_time(self._stop) / 1e3 if self._cuda else self._stop - self._start


MEDIAN_STEPS, EXPLOSION_FACTOR, EXPLOSION_STEPS = 50, 1.5, 100


class ExplosionDetector:
    """The loss explodes when its rolling median over 50 steps stays above 1.5 times the first loss
    for 100 steps after warm-up. ``uninformed_loss``, where it is larger, stands for the first loss: what a head that begins
    with a prior would have begun with without it."""

    def __init__(self, warmup_steps: int, uninformed_loss: float) -> None:
        self._warmup_steps, self._uninformed_loss = warmup_steps, uninformed_loss
        self._recent: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._first: float | None = None
        self._above = 0

    def exploded(self, step: int, loss: float) -> bool:
        """Take one finite or non-finite loss; True at the step that completes the condition."""
        self._first = max(loss, self._uninformed_loss) if self._first is None else self._first
        self._recent.append(loss)
        if step <= self._warmup_steps or len(self._recent) < MEDIAN_STEPS:
            return False
        self._median = median(self._recent)
        self._above = self._above + 1 if self._median > EXPLOSION_FACTOR * self._first else 0
        return self._above >= EXPLOSION_STEPS

    def describe(self) -> str:
        return (
            f"rolling median loss {self._median:.4g} above {EXPLOSION_FACTOR} times the "
            f"{'loss of an uninformed model' if self._first == self._uninformed_loss else 'first loss'} "
            f"{self._first:.4g} for {EXPLOSION_STEPS} steps"
        )


@dataclass(frozen=True)
class MeasuredStep:
    """A step's row (`instrument.watch.counters.REPORTED`), its logit statistics by micro-batch, and what the host
    knows. ``world``: how many processes it is of; ``rank_of``: as `Surface`'s."""

    row: dict[str, float]
    logits: list[dict[str, Any]]
    step_time_s: float
    allocated_bytes: int | None
    world: int = 1
    rank_of: dict[str, int | None] | None = None


def merge_ranks(measured: Sequence[MeasuredStep]) -> MeasuredStep:
    """The step of all ranks from that of each. ``rank_of`` is None for a non-finite tensor that all of them show, as
    after a sum over ranks. Micro-batches were dealt in equal blocks."""
    if len(measured) == 1:
        return measured[0]
    rows, per_rank = [m.row for m in measured], len(measured[0].logits)
    row = dict(rows[0])  # after the sum of gradients all rows are alike
    row["loss"] = sum(r["loss"] for r in rows)
    row["loss_microbatch"] = min(
        (rank * per_rank + r["loss_microbatch"] for rank, r in enumerate(rows) if r["loss_microbatch"] >= 0), default=-1.0
    )
    rank_of = {}
    for kind in ("backward", "state", "param"):
        index = min((r[f"{kind}_tensor"] for r in rows if r[f"{kind}_tensor"] >= 0), default=-1.0)
        showing = [rank for rank, r in enumerate(rows) if r[f"{kind}_tensor"] == index >= 0]
        row[f"{kind}_tensor"] = index
        row[f"{kind}_nan"] = sum(rows[rank][f"{kind}_nan"] for rank in showing)
        rank_of[kind] = showing[0] if showing and len(showing) < len(rows) else None
    return MeasuredStep(
        row,
        [slot for m in measured for slot in m.logits],
        max(m.step_time_s for m in measured),
        max((m.allocated_bytes for m in measured if m.allocated_bytes is not None), default=None),
        len(measured),
        rank_of,
    )


@dataclass
class StepFacts:
    """What the host knows of a step without asking the device."""

    step: int
    lr: float
    clock: StepClock
    samples: int = 0
    tokens: int = 0
    real_tokens: int = 0
    seq_len: int = 0
    targets: int = 0
    micro_batches: int = 0
    allocated_bytes: int | None = None
    lengths: torch.Tensor | None = None


@dataclass(frozen=True)
class Divergence:
    """Why a run ends: the exact step, and the first non-finite value (None: the loss exploded)."""

    step: int
    first_nonfinite: FirstNonfinite | None
    reason: str


@dataclass
class Reading:
    """A read log window."""

    steps: list[StepRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    divergence: Divergence | None = None
    modules: list[TapReading] = field(default_factory=list)
    lengths: list[torch.Tensor] = field(default_factory=list)
    """Real tokens of every row, step by step."""


class StepMeter:
    """Statistics of the steps of one run. ``window`` steps of at most ``micro_batches`` micro-batches are
    read at a time. ``taps`` measure the modules as well; they are read when their ring is half full, at a
    divergence, and by the caller at the end. ``recorder``, of a replay, gets every micro-batch's loss. ``gather``: every
    process' steps by rank, where several share a run: all read the same of them, at the same time;
    ``named_parameters``: what the optimizer updates, where that is not the model's own parameters."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        window: int,
        micro_batches: int,
        warmup_steps: int,
        uninformed_loss: float = 0.0,
        taps: ModuleTaps | None = None,
        recorder: OpRecorder | None = None,
        gather: Callable[[list[MeasuredStep]], list[list[MeasuredStep]]] = lambda mine: [mine],
        named_parameters: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        self.counters = StepCounters(model, optimizer, window=window, columns=REPORTED, named_parameters=named_parameters)
        self.device = device
        self.taps = taps
        self._recorder = recorder
        self._gather = gather
        self._logits = LogitStats(device, slots=window * micro_batches)
        self._slots_used = 0
        self._pending: list[StepFacts] = []
        self._explosion = ExplosionDetector(warmup_steps, uninformed_loss)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """In the order in which `gradients` expects their statistics."""
        return self.counters.parameters

    def resume(self, earlier: Iterable[StepRecord]) -> None:
        """Take in the steps of a run that is resumed, in order: the explosion detector looks back at them."""
        for record in earlier:
            self._explosion.exploded(record.step, math.nan if record.loss is None else record.loss)

    def begin_step(self, step: int, lr: float, loss_scale: torch.Tensor | None) -> None:
        """Start the clock of attempted update ``step``; ``loss_scale`` is a device scalar or None."""
        if self.taps is not None:
            self.taps.begin_step(step)
        self._facts = StepFacts(step, lr, StepClock(self.device))
        self.counters.begin(loss_scale)

    def count(self, batch) -> None:
        """The whole step's batch: its samples, and its tokens with and without padding."""
        facts = self._facts
        facts.samples, facts.tokens = batch.samples, batch.tokens
        facts.real_tokens, facts.seq_len = batch.real_tokens, batch.seq_len
        facts.lengths, facts.targets = batch.lengths, batch.n_targets

    def next_logits(self) -> LogitStats:
        """The accumulator for the next micro-batch's logits: each has a slot of its own."""
        if self._slots_used:
            self._logits.advance()
        self._slots_used += 1
        return self._logits

    def add_loss(self, loss: torch.Tensor) -> None:
        """The share of the step's loss of the micro-batch whose logits came last."""
        if self._recorder is not None:
            self._recorder.loss(loss)
        self.counters.loss(loss)
        self._facts.micro_batches += 1

    def gradients(self, stats: TensorStats, *, clip_norm: torch.Tensor) -> None:
        """Statistics of the true gradients before clipping, in the order of the model's parameters, and
        the norm that clipping used (another where it is computed in fp16)."""
        self.counters.report_gradients(stats, clip_norm=clip_norm)

    def updated(self) -> None:
        """The optimizer has stepped, or its step was skipped."""
        self.counters.measure_update()

    def end_step(self) -> None:
        if self.taps is not None:
            self.taps.end_step()
        self._facts.clock.stop()
        if self.device.type == "cuda":
            self._facts.allocated_bytes = torch.cuda.memory_allocated(self.device)
        self.counters.end()
        self._pending.append(self._facts)

    @property
    def due(self) -> bool:
        return self.counters.full

    def read(self) -> Reading:
        """Decode the pending rows (the only sync) up to and with the step that diverged."""
        reading = Reading()
        for facts, measured in zip(self._pending, self._measured(), strict=True):
            row = measured.row
            surface = Surface(facts.step, row, self.counters, measured.logits, world=measured.world, rank_of=measured.rank_of)
            reading.steps.append(_record(facts, measured, surface))
            reading.lengths.append(facts.lengths)
            if not surface.updated:
                reading.events.append(
                    EventRecord(
                        step=facts.step,
                        kind="scaler_skip",
                        detail={
                            "loss_scale": row["loss_scale"],
                            "grad_nonfinite": int(row["grad_nonfinite"]),
                            "tensor": self.counters.names[int(row["backward_tensor"])],
                        },
                    )
                )
            if surface.emptied:
                norms = {"clip_norm": nonfinite_name(row["clip_norm"]), "grad_norm": row["grad_norm"]}
                reading.events.append(EventRecord(step=facts.step, kind="clip_norm", detail=norms))
            if (found := surface.first_nonfinite()) is not None:
                reading.divergence = Divergence(facts.step, found, f"{found.tensor} is {found.kind}")
            elif self._explosion.exploded(facts.step, row["loss"]):
                reading.divergence = Divergence(facts.step, None, self._explosion.describe())
            if reading.divergence is not None:
                break
        self._pending.clear()
        if self.taps is not None and (reading.divergence is not None or self.taps.nearly_full):
            reading.modules = self.taps.read()
        return reading

    def _measured(self) -> Iterator[MeasuredStep]:
        """The pending steps: row, the logit statistics of each micro-batch, times; of all ranks."""
        rows = self.counters.read()
        slots = iter(self._logits.read_all() if self._slots_used else [])
        self._logits.reset()
        self._slots_used = 0
        mine = [
            MeasuredStep(row, [next(slots) for _ in range(facts.micro_batches)], facts.clock.seconds(), facts.allocated_bytes)
            for facts, row in zip(self._pending, rows, strict=True)
        ]
        yield from map(merge_ranks, zip(*self._gather(mine), strict=True))


def _record(facts: StepFacts, measured: MeasuredStep, surface: Surface) -> StepRecord:
    row, logits = measured.row, measured.logits
    return StepRecord(
        step=facts.step,
        loss=row["loss"],
        lr=facts.lr,
        grad_norm=row["grad_norm"],
        grad_absmax=row["grad_absmax"],
        grad_nonfinite=int(row["grad_nonfinite"]),
        grad_underflow_frac=row["grad_below"] / row["grad_nonzero"] if row["grad_nonzero"] else None,
        logit_absmax=max((s["absmax"] for s in logits if s["absmax"] is not None), default=None),
        logit_nonfinite=sum(s["nan"] + s["pos_inf"] + s["neg_inf"] for s in logits),
        logit_over_fp16=sum(s["over_fp16"] for s in logits),
        loss_scale=row["loss_scale"] if row["loss_scale"] >= 0 else None,
        step_skipped=not surface.updated,
        step_time_s=measured.step_time_s,
        samples=facts.samples,
        tokens=facts.tokens,
        real_tokens=facts.real_tokens,
        seq_len=facts.seq_len,
        allocated_bytes=measured.allocated_bytes,
        targets=facts.targets,
    )
