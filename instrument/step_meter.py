"""What every step reports, gathered on the device and read once per log window.

The loop hands over tensors as it makes them (`forward`, `gradients`, `updated`); each call
leaves device scalars, and `end_step` stacks them into one row of a ring buffer. The host reads
the ring at the log points only, so nothing here waits for the GPU in between. The step of the
first non-finite value is exact whatever the window, because every step has its own row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from instrument.explosion import ExplosionDetector
from instrument.records import EventRecord, FirstNonfinite, StepRecord, nonfinite_name
from instrument.step_clock import StepClock
from kernels import LogitStats, TensorStats, multi_tensor_stats

COLUMNS = ("loss", "loss_microbatch", "loss_scale", "grad_norm", "grad_absmax", "grad_nonfinite", "grad_below",
           "grad_nonzero", "grad_tensor", "grad_nan", "clip_norm", "state_tensor", "state_nan", "param_tensor", "param_nan")
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


class StepMeter:
    """Statistics of the steps of one run. ``window`` steps of at most ``micro_batches`` micro-batches are
    read at a time."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *,
                 window: int, micro_batches: int, warmup_steps: int) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = optimizer
        self.device = device
        self.window = window
        self._logits = LogitStats(device, slots=window * micro_batches)
        self._slots_used = 0
        self._ring = torch.zeros(window, len(COLUMNS), dtype=torch.float64, device=device)
        self._pending: list[StepFacts] = []
        self._row: dict[str, torch.Tensor] = {}
        self._none = torch.full((), -1.0, dtype=torch.float64, device=device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._explosion = ExplosionDetector(warmup_steps)
        self._states: list[tuple[str, str, torch.Tensor]] = []

    def begin_step(self, step: int, lr: float, loss_scale: torch.Tensor | None) -> None:
        """Start the clock of attempted update ``step``; ``loss_scale`` is a device scalar or None."""
        self._facts = StepFacts(step, lr, StepClock(self.device))
        self._row = {"loss": self._zero, "loss_microbatch": self._none,
                     "loss_scale": self._none if loss_scale is None else loss_scale}

    def count(self, batch) -> None:
        """The whole step's batch: its samples, and its tokens with and without padding."""
        facts = self._facts
        facts.samples, facts.tokens = batch.samples, batch.tokens
        facts.real_tokens, facts.seq_len = batch.real_tokens, batch.seq_len

    def next_logits(self) -> LogitStats:
        """The accumulator for the next micro-batch's logits: each has a slot of its own."""
        if self._slots_used:
            self._logits.advance()
        self._slots_used += 1
        return self._logits

    @torch.no_grad()
    def add_loss(self, loss: torch.Tensor) -> None:
        """The share of the step's loss of the micro-batch whose logits came last."""
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
            "grad_norm": stats.total_norm, "grad_absmax": stats.total_absmax,
            "grad_nonfinite": stats.total_nan + stats.total_inf, "grad_below": stats.total_below,
            "grad_nonzero": stats.total_numel - stats.total_zeros, "clip_norm": clip_norm,
            **self._first("grad", stats),
        }

    @torch.no_grad()
    def updated(self) -> None:
        """Parameters and optimizer states behind the update."""
        if not self._states:  # made by the first update that is not skipped
            self._states = float_states(self.optimizer, self.parameters, self.names)
        self._row |= self._first_bad("param", self.parameters)
        self._row |= self._first_bad("state", [tensor for *_, tensor in self._states])

    def _first_bad(self, kind: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The columns of a list that is only checked for non-finite values."""
        if not tensors or (self.device.type == "cpu" and _all_finite(tensors)):
            return {f"{kind}_tensor": self._none, f"{kind}_nan": self._zero}
        return self._first(kind, multi_tensor_stats(tensors, counts="none"))

    def end_step(self) -> None:
        """Close the step: one small stack on the device."""
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
        for facts, row, logits in self._pending_rows():
            record = self._record(facts, row, logits)
            reading.steps.append(record)
            found = self._first_nonfinite(facts.step, row, logits)
            if record.step_skipped:
                reading.events.append(EventRecord(step=facts.step, kind="scaler_skip", detail={
                    "loss_scale": row["loss_scale"], "grad_nonfinite": int(row["grad_nonfinite"]),
                    "tensor": self.names[int(row["grad_tensor"])]}))
            if found is not None and self._diverged(row, record):
                reading.divergence = Divergence(facts.step, found, f"{found.tensor} is {found.kind}")
            elif self._explosion.exploded(facts.step, row["loss"]):
                reading.divergence = Divergence(facts.step, None, self._explosion.describe())
            if reading.divergence is not None:
                break
        self._pending.clear()
        return reading

    def _pending_rows(self) -> Iterator[tuple[StepFacts, dict[str, float], list[dict]]]:
        """The pending steps: host facts, ring row, and the logit statistics of each micro-batch."""
        rows = self._ring[:len(self._pending)].tolist()
        slots = iter(self._logits.read_async()() if self._slots_used else [])
        self._logits.reset()
        self._slots_used = 0
        for facts, values in zip(self._pending, rows, strict=True):
            yield facts, dict(zip(COLUMNS, values, strict=True)), [next(slots) for _ in range(facts.micro_batches)]

    @staticmethod
    def _first(kind: str, stats: TensorStats) -> dict[str, torch.Tensor]:
        """Index of the first non-finite tensor of a list, and by how many NaN prevail in it."""
        index = stats.first_nonfinite_index
        surplus = (stats.nan - stats.inf).index_select(0, index.clamp(min=0).view(1)).squeeze(0)
        return {f"{kind}_tensor": index, f"{kind}_nan": surplus}

    @staticmethod
    def _record(facts: StepFacts, row: dict[str, float], logits: list[dict]) -> StepRecord:
        scaled = row["loss_scale"] >= 0
        return StepRecord(
            step=facts.step, loss=row["loss"], lr=facts.lr, grad_norm=row["grad_norm"],
            grad_absmax=row["grad_absmax"], grad_nonfinite=int(row["grad_nonfinite"]),
            grad_underflow_frac=row["grad_below"] / row["grad_nonzero"] if row["grad_nonzero"] else None,
            logit_absmax=max((s["absmax"] for s in logits if s["absmax"] is not None), default=None),
            logit_nonfinite=sum(s["nan"] + s["pos_inf"] + s["neg_inf"] for s in logits),
            logit_over_fp16=sum(s["over_fp16"] for s in logits), loss_scale=row["loss_scale"] if scaled else None,
            step_skipped=scaled and row["grad_nonfinite"] > 0, step_time_s=facts.clock.seconds(),
            samples=facts.samples, tokens=facts.tokens, real_tokens=facts.real_tokens,
            seq_len=facts.seq_len, allocated_bytes=facts.allocated_bytes)

    @staticmethod
    def _diverged(row: dict[str, float], record: StepRecord) -> bool:
        """Non-finite loss, gradient of an update that is not skipped, parameter or state."""
        return (not math.isfinite(row["loss"]) or (row["grad_nonfinite"] > 0 and not record.step_skipped)
                or row["param_tensor"] >= 0 or row["state_tensor"] >= 0)

    def _first_nonfinite(self, step: int, row: dict[str, float], logits: list[dict]) -> FirstNonfinite | None:
        """The earliest phase of the step that shows a non-finite value."""
        for index, slot in enumerate(logits):
            counts = {"nan": slot["nan"], "inf": slot["pos_inf"], "-inf": slot["neg_inf"]}
            if any(counts.values()):
                return _found(step, "forward", "output", max(counts, key=counts.get), microbatch=index)
        if not math.isfinite(row["loss"]):
            microbatch = None if row["loss_microbatch"] < 0 else int(row["loss_microbatch"])
            return _found(step, "loss", "output", nonfinite_name(row["loss"]), microbatch=microbatch)
        if row["grad_tensor"] >= 0:
            index = int(row["grad_tensor"])
            return _found(step, "backward", "grad", _prevailing(row["grad_nan"]), **self._place(index))
        if not math.isfinite(row["clip_norm"]) and row["param_tensor"] >= 0:
            return _found(step, "clip", "grad_norm", nonfinite_name(row["clip_norm"]))
        if row["state_tensor"] >= 0:
            name, tensor, value = self._states[int(row["state_tensor"])]
            return _found(step, "optimizer", tensor, _prevailing(row["state_nan"]), module=name.rpartition(".")[0],
                          dtype=value.dtype)
        if row["param_tensor"] >= 0:
            return _found(step, "optimizer", "param", _prevailing(row["param_nan"]), **self._place(int(row["param_tensor"])))
        return None

    def _place(self, index: int) -> dict[str, object]:
        return {"module": self.names[index].rpartition(".")[0], "dtype": self.parameters[index].dtype}


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """On a CPU, where reading a number is free, a finite norm proves a list finite at a tenth of the cost."""
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).isfinite().all())


def _prevailing(nan_surplus: float) -> str:
    """The kind of a tensor with ``nan_surplus`` more NaN than infinities."""
    return "nan" if nan_surplus > 0 else "inf"


def _found(step: int, phase: str, tensor: str, kind: str, *, module: str | None = None,
           microbatch: int | None = None, dtype: torch.dtype | None = None) -> FirstNonfinite:
    """A record with what the meter knows; op, cause and headroom are the replay's to fill."""
    return FirstNonfinite(
        step=step, microbatch=microbatch, phase=phase, phase_surfaced=phase, module=module, op=None,
        tensor=tensor, source_tensor=None, kind=kind, dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        cause=None, input_absmax=None, headroom_bits=None)


def float_states(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor],
                 names: list[str]) -> list[tuple[str, str, torch.Tensor]]:
    """(parameter name, state name, tensor) of every floating-point state but step counters.

    8-bit states are integers with fp32 block scales (``absmax1``, ``absmax2``): an overflow
    shows in the scales, so those stand for them.
    """
    spelled = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg", "absmax2": "exp_avg_sq"}
    found = []
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.is_floating_point() and key not in ("step", "qmap1", "qmap2"):
                found.append((name, spelled.get(key, key), value))
    return found
