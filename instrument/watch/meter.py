"""What every step reports, gathered on the device and read once per log window.

The loop hands over tensors as it makes them (`forward`, `gradients`, `updated`); each call
leaves device scalars, and `end_step` stacks them into one row of a ring buffer. The host reads
the ring at the log points only, so nothing here waits for the GPU in between. The step of the
first non-finite value is exact whatever the window, because every step has its own row.

The duration of one step, measured without waiting for the device.

When a finite loss counts as a divergence. Torch-free.

One step as several processes measured it, each its own micro-batches, put together. Torch-free.
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

from instrument.results.ranges import TapReading
from instrument.results.schemas import EventRecord, FirstNonfinite, StepRecord, nonfinite_name
from instrument.watch.counters import first_bad, first_of, float_states, prevailing, surfaced
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
    for 100 steps after warm-up."""

    def __init__(self, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._recent: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._first: float | None = None
        self._above = 0

    def exploded(self, step: int, loss: float) -> bool:
        """Take one finite or non-finite loss; True at the step that completes the condition."""
        self._first = loss if self._first is None else self._first
        self._recent.append(loss)
        if step <= self._warmup_steps or len(self._recent) < MEDIAN_STEPS:
            return False
        self._median = median(self._recent)
        self._above = self._above + 1 if self._median > EXPLOSION_FACTOR * self._first else 0
        return self._above >= EXPLOSION_STEPS

    def describe(self) -> str:
        """The condition in words."""
        return (
            f"rolling median loss {self._median:.4g} above {EXPLOSION_FACTOR} times the first loss "
            f"{self._first:.4g} for {EXPLOSION_STEPS} steps"
        )


@dataclass(frozen=True)
class MeasuredStep:
    """A step's ring row (`instrument.watch.meter.COLUMNS`), its logit statistics by micro-batch, and what the host
    knows. ``world``: how many processes it is of."""

    row: dict[str, float]
    logits: list[dict[str, Any]]
    step_time_s: float
    allocated_bytes: int | None
    world: int = 1

    def rank_of(self, microbatch: int | None) -> int | None:
        """The process that ran a micro-batch; None for a single one."""
        return microbatch // (len(self.logits) // self.world) if self.world > 1 and microbatch is not None else None


def together(measured: Sequence[MeasuredStep]) -> tuple[MeasuredStep, dict[str, int | None]]:
    """The step of all ranks from that of each, and which rank shows a non-finite gradient, state or parameter
    (``grad``, ``state``, ``param``): None where all do, as behind a sum over ranks. Micro-batches were dealt in
    equal blocks."""
    if len(measured) == 1:
        return measured[0], dict.fromkeys(("grad", "state", "param"))
    rows, per_rank = [m.row for m in measured], len(measured[0].logits)
    row = dict(rows[0])  # what comes behind the sum of gradients is everybody's
    row["loss"] = sum(r["loss"] for r in rows)
    row["loss_microbatch"] = min(
        (rank * per_rank + r["loss_microbatch"] for rank, r in enumerate(rows) if r["loss_microbatch"] >= 0), default=-1.0
    )
    found = {}
    for kind in ("grad", "state", "param"):
        index = min((r[f"{kind}_tensor"] for r in rows if r[f"{kind}_tensor"] >= 0), default=-1.0)
        showing = [rank for rank, r in enumerate(rows) if r[f"{kind}_tensor"] == index >= 0]
        row[f"{kind}_tensor"] = index
        row[f"{kind}_nan"] = sum(rows[rank][f"{kind}_nan"] for rank in showing)
        found[kind] = showing[0] if showing and len(showing) < len(rows) else None
    return MeasuredStep(
        row,
        [slot for m in measured for slot in m.logits],
        max(m.step_time_s for m in measured),
        max((m.allocated_bytes for m in measured if m.allocated_bytes is not None), default=None),
        len(measured),
    ), found


COLUMNS = (
    "loss",
    "loss_microbatch",
    "loss_scale",
    "grad_norm",
    "grad_absmax",
    "grad_nonfinite",
    "grad_below",
    "grad_nonzero",
    "grad_tensor",
    "grad_nan",
    "clip_norm",
    "state_tensor",
    "state_nan",
    "param_tensor",
    "param_nan",
)
"""One ring row, float64. ``*_tensor`` is the index of the first non-finite tensor of its list or -1,
``*_nan`` how many NaN it holds beyond its infinities, ``loss_microbatch`` the first bad one or -1."""


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
    divergence, and by the caller at the end. ``on_loss`` is told every micro-batch's loss. ``gather``: every
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
        taps: ModuleTaps | None = None,
        gather: Callable[[list[MeasuredStep]], list[list[MeasuredStep]]] = lambda mine: [mine],
        named_parameters: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        named = named_parameters or [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = optimizer
        self.device = device
        self.window = window
        self.taps = taps
        self._gather = gather
        self.on_loss: Callable[[torch.Tensor], None] | None = None
        self._logits = LogitStats(device, slots=window * micro_batches)
        self._slots_used = 0
        self._ring = torch.zeros(window, len(COLUMNS), dtype=torch.float64, device=device)
        self._pending: list[StepFacts] = []
        self._row: dict[str, torch.Tensor] = {}
        self._none = torch.full((), -1.0, dtype=torch.float64, device=device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._explosion = ExplosionDetector(warmup_steps)
        self._states: list[tuple[str, str, torch.Tensor]] = []

    def go_on(self, earlier: Iterable[StepRecord]) -> None:
        """Take in the steps of a run that is continued, in order: the explosion detector looks back at them."""
        for record in earlier:
            self._explosion.exploded(record.step, record.loss)

    def begin_step(self, step: int, lr: float, loss_scale: torch.Tensor | None) -> None:
        """Start the clock of attempted update ``step``; ``loss_scale`` is a device scalar or None."""
        if self.taps is not None:
            self.taps.begin_step(step)
        self._facts = StepFacts(step, lr, StepClock(self.device))
        self._row = {
            "loss": self._zero,
            "loss_microbatch": self._none,
            "loss_scale": self._none if loss_scale is None else loss_scale,
        }

    def count(self, batch) -> None:
        """The whole step's batch: its samples, and its tokens with and without padding."""
        facts = self._facts
        facts.samples, facts.tokens = batch.samples, batch.tokens
        facts.real_tokens, facts.seq_len = batch.real_tokens, batch.seq_len
        facts.lengths = batch.lengths

    def next_logits(self) -> LogitStats:
        """The accumulator for the next micro-batch's logits: each has a slot of its own."""
        if self._slots_used:
            self._logits.advance()
        self._slots_used += 1
        return self._logits

    @torch.no_grad()
    def add_loss(self, loss: torch.Tensor) -> None:
        """The share of the step's loss of the micro-batch whose logits came last."""
        if self.on_loss is not None:
            self.on_loss(loss)
        row = self._row
        total = row["loss"] + loss.detach()
        first_bad = (row["loss_microbatch"] < 0) & ~total.isfinite()  # finite shares do not overflow a float64
        row["loss_microbatch"] = torch.where(first_bad, float(self._facts.micro_batches), row["loss_microbatch"])
        row["loss"] = total
        self._facts.micro_batches += 1

    @torch.no_grad()
    def gradients(self, stats: TensorStats, *, clip_norm: torch.Tensor) -> None:
        """Statistics of the true gradients before clipping, in the order of the model's parameters, and
        the norm that clipping used (another where it is computed in fp16)."""
        self._row |= {
            "grad_norm": stats.total_norm,
            "grad_absmax": stats.total_absmax,
            "grad_nonfinite": stats.total_nan + stats.total_inf,
            "grad_below": stats.total_below,
            "grad_nonzero": stats.total_numel - stats.total_zeros,
            "clip_norm": clip_norm,
            **first_of("grad", stats),
        }

    @torch.no_grad()
    def updated(self) -> None:
        """Parameters and optimizer states behind the update."""
        if not self._states:  # made by the first update that is not skipped
            self._states = float_states(self.optimizer, self.parameters, self.names)
        self._row |= first_bad("param", self.parameters, self.device)
        self._row |= first_bad("state", [tensor for *_, tensor in self._states], self.device)

    def end_step(self) -> None:
        """Close the step: one small stack on the device."""
        if self.taps is not None:
            self.taps.end_step()
        self._facts.clock.stop()
        if self.device.type == "cuda":
            self._facts.allocated_bytes = torch.cuda.memory_allocated(self.device)
        self._ring[len(self._pending)] = torch.stack([self._row[name].double() for name in COLUMNS])
        self._pending.append(self._facts)

    @property
    def due(self) -> bool:
        """Whether the window is full."""
        return len(self._pending) == self.window

    def read(self) -> Reading:
        """Decode the pending rows (the only sync) up to and with the step that diverged."""
        reading = Reading()
        for facts, (measured, ranks) in zip(self._pending, self._measured(), strict=True):
            row, record = measured.row, self._record(facts, measured)
            reading.steps.append(record)
            reading.lengths.append(facts.lengths)
            found = self._first_nonfinite(facts.step, measured, ranks)
            if record.step_skipped:
                reading.events.append(
                    EventRecord(
                        step=facts.step,
                        kind="scaler_skip",
                        detail={
                            "loss_scale": row["loss_scale"],
                            "grad_nonfinite": int(row["grad_nonfinite"]),
                            "tensor": self.names[int(row["grad_tensor"])],
                        },
                    )
                )
            if found is not None and self._diverged(row, record):
                reading.divergence = Divergence(facts.step, found, f"{found.tensor} is {found.kind}")
            elif self._explosion.exploded(facts.step, row["loss"]):
                reading.divergence = Divergence(facts.step, None, self._explosion.describe())
            if reading.divergence is not None:
                break
        self._pending.clear()
        if self.taps is not None and (reading.divergence is not None or self.taps.nearly_full):
            reading.modules = self.taps.read()
        return reading

    def _measured(self) -> Iterator[tuple[MeasuredStep, dict[str, int | None]]]:
        """The pending steps: ring row, the logit statistics of each micro-batch, times; of all ranks."""
        rows = self._ring[: len(self._pending)].tolist()
        slots = iter(self._logits.read_async()() if self._slots_used else [])
        self._logits.reset()
        self._slots_used = 0
        mine = [
            MeasuredStep(
                dict(zip(COLUMNS, values, strict=True)),
                [next(slots) for _ in range(facts.micro_batches)],
                facts.clock.seconds(),
                facts.allocated_bytes,
            )
            for facts, values in zip(self._pending, rows, strict=True)
        ]
        yield from map(together, zip(*self._gather(mine), strict=True))

    @staticmethod
    def _record(facts: StepFacts, measured: MeasuredStep) -> StepRecord:
        row, logits = measured.row, measured.logits
        scaled = row["loss_scale"] >= 0
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
            loss_scale=row["loss_scale"] if scaled else None,
            step_skipped=scaled and row["grad_nonfinite"] > 0,
            step_time_s=measured.step_time_s,
            samples=facts.samples,
            tokens=facts.tokens,
            real_tokens=facts.real_tokens,
            seq_len=facts.seq_len,
            allocated_bytes=measured.allocated_bytes,
        )

    @staticmethod
    def _diverged(row: dict[str, float], record: StepRecord) -> bool:
        """Non-finite loss, gradient of an update that is not skipped, parameter or state."""
        return (
            not math.isfinite(row["loss"])
            or (row["grad_nonfinite"] > 0 and not record.step_skipped)
            or row["param_tensor"] >= 0
            or row["state_tensor"] >= 0
        )

    def _first_nonfinite(self, step: int, measured: MeasuredStep, ranks: dict[str, int | None]) -> FirstNonfinite | None:
        """The earliest phase of the step that shows a non-finite value."""
        row = measured.row
        for index, slot in enumerate(measured.logits):
            counts = {"nan": slot["nan"], "inf": slot["pos_inf"], "-inf": slot["neg_inf"]}
            if any(counts.values()):
                return surfaced(
                    step, "forward", "output", max(counts, key=counts.get), microbatch=index, rank=measured.rank_of(index)
                )
        if not math.isfinite(row["loss"]):
            microbatch = None if row["loss_microbatch"] < 0 else int(row["loss_microbatch"])
            return surfaced(
                step, "loss", "output", nonfinite_name(row["loss"]), microbatch=microbatch, rank=measured.rank_of(microbatch)
            )
        if row["grad_tensor"] >= 0:
            index = int(row["grad_tensor"])
            return surfaced(step, "backward", "grad", prevailing(row["grad_nan"]), **self._place(index, ranks["grad"]))
        if not math.isfinite(row["clip_norm"]) and row["param_tensor"] >= 0:
            return surfaced(step, "clip", "grad_norm", nonfinite_name(row["clip_norm"]))
        if row["state_tensor"] >= 0:
            name, tensor, value = self._states[int(row["state_tensor"])]
            return surfaced(
                step,
                "optimizer",
                tensor,
                prevailing(row["state_nan"]),
                module=name.rpartition(".")[0],
                dtype=value.dtype,
                rank=ranks["state"],
            )
        if row["param_tensor"] >= 0:
            place = self._place(int(row["param_tensor"]), ranks["param"])
            return surfaced(step, "optimizer", "param", prevailing(row["param_nan"]), **place)
        return None

    def _place(self, index: int, rank: int | None) -> dict[str, object]:
        return {"module": self.names[index].rpartition(".")[0], "dtype": self.parameters[index].dtype, "rank": rank}
