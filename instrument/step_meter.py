"""What every step reports, gathered on the device and read once per log window.

The loop hands over tensors as it makes them (`forward`, `gradients`, `updated`); each call
leaves device scalars, and `end_step` stacks them into one row of a ring buffer. The host reads
the ring at the log points only, so nothing here waits for the GPU in between. The step of the
first non-finite value is exact whatever the window, because every step has its own row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from instrument.explosion import ExplosionDetector
from instrument.records import EventRecord, FirstNonfinite, StepRecord, nonfinite_name
from instrument.step_clock import StepClock
from kernels import multi_tensor_stats

FP16_MAX = 65_504.0
UNDERFLOW = 2.0**-24

COLUMNS = ("loss", "logit_absmax", "logit_nonfinite", "logit_over_fp16", "logit_microbatch", "logit_nan",
           "loss_microbatch", "grad_norm", "grad_absmax", "grad_nonfinite", "grad_below", "grad_nonzero",
           "loss_scale", "grad_tensor", "grad_nan", "clip_norm",
           "state_tensor", "state_nan", "param_tensor", "param_nan")
"""One ring row, float64. ``*_tensor`` is the index of the first non-finite tensor or -1,
``*_nan`` how many NaN it holds beyond its infinities, ``*_microbatch`` the first bad one or -1."""


@dataclass
class StepFacts:
    """What the host knows of a step without asking the device."""

    step: int
    lr: float
    samples: int
    tokens: int
    real_tokens: int
    seq_len: int
    clock: StepClock
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
    """Statistics of the steps of one run. ``window`` steps are read at a time."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *,
                 window: int, warmup_steps: int) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = optimizer
        self.device = device
        self.window = window
        self._ring = torch.zeros(window, len(COLUMNS), dtype=torch.float64, device=device)
        self._pending: list[StepFacts] = []
        self._row: dict[str, torch.Tensor] = {}
        self._none = torch.full((), -1.0, dtype=torch.float64, device=device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._explosion = ExplosionDetector(warmup_steps)
        self._states: list[tuple[str, str, torch.Tensor]] = []

    def begin_step(self, step: int, lr: float, batch) -> None:
        """Start the clock of attempted update ``step``; ``batch`` is the whole step's."""
        self._facts = StepFacts(step, lr, batch.samples, batch.tokens, batch.real_tokens, batch.seq_len,
                                StepClock(self.device))
        self._row = {"loss": self._zero, "logit_absmax": self._zero, "logit_nonfinite": self._zero,
                     "logit_nan": self._zero, "logit_over_fp16": self._zero,
                     "logit_microbatch": self._none, "loss_microbatch": self._none}

    @torch.no_grad()
    def forward(self, index: int, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor,
                valid_vocab: int | None) -> None:
        """A micro-batch's logits (..., V) and its share of the loss."""
        row = self._row
        absmax, nan, infinite, over = logit_statistics(logits, targets, valid_vocab)
        row["loss"] = row["loss"] + loss.detach().double()
        row["logit_absmax"] = torch.maximum(row["logit_absmax"], absmax)
        row["logit_nonfinite"] = row["logit_nonfinite"] + nan + infinite
        row["logit_nan"] = row["logit_nan"] + nan - infinite
        row["logit_over_fp16"] = row["logit_over_fp16"] + over
        for column, bad in (("logit_microbatch", nan + infinite > 0), ("loss_microbatch", ~loss.detach().isfinite())):
            first_seen = torch.where((row[column] < 0) & bad, float(index), row[column])
            row[column] = first_seen.double()

    @torch.no_grad()
    def gradients(self, loss_scale: torch.Tensor | None) -> torch.Tensor:
        """Unscaled gradients before clipping; returns their global norm, a 0-d device tensor.

        ``loss_scale``: the scale at which backward ran, since underflow happened at that scale.
        """
        grads = [p.grad for p in self.parameters]
        scale = self._zero + 1 if loss_scale is None else loss_scale.double()
        stats = multi_tensor_stats(grads, underflow_below=UNDERFLOW / scale)
        self._row |= {
            "grad_norm": stats.total_norm, "grad_absmax": stats.total_absmax,
            "grad_nonfinite": (stats.total_nan + stats.total_inf).double(),
            "grad_below": stats.total_below.double(),
            "grad_nonzero": (stats.total_numel - stats.total_zeros).double(),
            "loss_scale": self._none if loss_scale is None else scale,
            "clip_norm": stats.total_norm,
            **self._first("grad", stats),
        }
        return stats.total_norm

    def clipped(self, norm: torch.Tensor) -> None:
        """The norm that clipping used, where it is not `gradients`' own."""
        self._row["clip_norm"] = norm.double()

    @torch.no_grad()
    def updated(self) -> None:
        """Parameters and optimizer states behind the update."""
        self._row |= self._first("param", multi_tensor_stats(self.parameters))
        if not self._states:
            self._states = float_states(self.optimizer, self.parameters, self.names)
        if self._states:
            self._row |= self._first("state", multi_tensor_stats([tensor for *_, tensor in self._states]))
        else:  # a skipped first step leaves no states behind
            self._row |= {"state_tensor": self._none, "state_nan": self._zero}

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
        rows = self._ring[:len(self._pending)].tolist()
        for facts, values in zip(self._pending, rows, strict=True):
            row = dict(zip(COLUMNS, values, strict=True))
            record = self._record(facts, row)
            reading.steps.append(record)
            found = self._first_nonfinite(facts.step, row)
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

    def _first(self, kind: str, stats) -> dict[str, torch.Tensor]:
        """Index of the first non-finite tensor of a list, and whether NaN prevails in it."""
        index = stats.first_nonfinite_index
        at = index.clamp(min=0).view(1)
        nan_surplus = (stats.nan - stats.inf).index_select(0, at).squeeze(0)
        return {f"{kind}_tensor": index.double(), f"{kind}_nan": nan_surplus.double()}

    def _record(self, facts: StepFacts, row: dict[str, float]) -> StepRecord:
        scaled = row["loss_scale"] >= 0
        return StepRecord(
            step=facts.step, loss=row["loss"], lr=facts.lr, grad_norm=row["grad_norm"],
            grad_absmax=row["grad_absmax"], grad_nonfinite=int(row["grad_nonfinite"]),
            grad_underflow_frac=row["grad_below"] / row["grad_nonzero"] if row["grad_nonzero"] else None,
            logit_absmax=row["logit_absmax"], logit_nonfinite=int(row["logit_nonfinite"]),
            logit_over_fp16=int(row["logit_over_fp16"]), loss_scale=row["loss_scale"] if scaled else None,
            step_skipped=scaled and row["grad_nonfinite"] > 0, step_time_s=facts.clock.seconds(),
            samples=facts.samples, tokens=facts.tokens, real_tokens=facts.real_tokens,
            seq_len=facts.seq_len, allocated_bytes=facts.allocated_bytes)

    @staticmethod
    def _diverged(row: dict[str, float], record: StepRecord) -> bool:
        """Non-finite loss, gradient of an update that is not skipped, parameter or state."""
        return (not math.isfinite(row["loss"]) or (row["grad_nonfinite"] > 0 and not record.step_skipped)
                or row["param_tensor"] >= 0 or row["state_tensor"] >= 0)

    def _first_nonfinite(self, step: int, row: dict[str, float]) -> FirstNonfinite | None:
        """The earliest phase of the step that shows a non-finite value."""
        if row["logit_microbatch"] >= 0:
            return _found(step, "forward", "head", "output", row["logit_nan"], microbatch=int(row["logit_microbatch"]))
        if not math.isfinite(row["loss"]):
            return _found(step, "loss", None, "output", math.nan, kind=nonfinite_name(row["loss"]),
                          microbatch=None if row["loss_microbatch"] < 0 else int(row["loss_microbatch"]))
        if row["grad_tensor"] >= 0:
            return self._parameter(step, "backward", "grad", row["grad_tensor"], row["grad_nan"])
        if not math.isfinite(row["clip_norm"]) and math.isfinite(row["grad_norm"]) and row["param_tensor"] >= 0:
            return _found(step, "clip", None, "grad_norm", math.nan, kind=nonfinite_name(row["clip_norm"]))
        if row["state_tensor"] >= 0:
            name, tensor, value = self._states[int(row["state_tensor"])]
            return _found(step, "optimizer", name.rpartition(".")[0], tensor, row["state_nan"], dtype=value.dtype)
        if row["param_tensor"] >= 0:
            return self._parameter(step, "optimizer", "param", row["param_tensor"], row["param_nan"])
        return None

    def _parameter(self, step: int, phase: str, tensor: str, index: float, nan: float) -> FirstNonfinite:
        name = self.names[int(index)]
        return _found(step, phase, name.rpartition(".")[0], tensor, nan, dtype=self.parameters[int(index)].dtype)


def _found(step: int, phase: str, module: str | None, tensor: str, nan_surplus: float, *, kind: str | None = None,
           microbatch: int | None = None, dtype: torch.dtype | None = None) -> FirstNonfinite:
    """A record with what the meter knows; op, cause and headroom are the replay's to fill."""
    return FirstNonfinite(
        step=step, microbatch=microbatch, phase=phase, phase_surfaced=phase, module=module, op=None,
        tensor=tensor, source_tensor=None, kind=kind or ("nan" if nan_surplus > 0 else "inf"),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."), cause=None,
        input_absmax=None, headroom_bits=None)


def logit_statistics(logits: torch.Tensor, targets: torch.Tensor,
                     valid_vocab: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest finite |x|, NaN count, Inf count, finite beyond 65,504), 0-d float64 tensors.

    Rows whose target is ignored and the vocabulary's pad columns take no part.
    """
    values = logits.detach()[..., :valid_vocab].flatten(0, -2)
    if targets.dtype == torch.int64:
        rows = (targets.flatten() != -100).unsqueeze(1)
        values = torch.where(rows, values, torch.zeros((), dtype=values.dtype, device=values.device))
    low, high = values.aminmax()  # both NaN when any element is
    magnitude = torch.maximum(high, -low)
    if values.device.type == "cpu" and bool(magnitude.isfinite()):  # reading costs nothing here
        zero = torch.zeros((), dtype=torch.float64)
        over = (values.abs() > FP16_MAX).sum().double() if magnitude > FP16_MAX else zero
        return magnitude.double(), zero, zero, over
    sizes = values.abs()
    finite = sizes.isfinite()
    nan, infinite = sizes.isnan().sum(), sizes.isinf().sum()
    largest = torch.where(finite, sizes, torch.zeros_like(sizes)).amax()
    return largest.double(), nan.double(), infinite.double(), (finite & (sizes > FP16_MAX)).sum().double()


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
