"""Which tensor of a list is the first non-finite one, as device scalars: nothing here waits for a GPU.

The counters of one step of a loop that is not ours, as device scalars: nothing here waits for a GPU.

Where a failure shows in the counters of one step of a loop that is not ours. Torch-free.

The counters name the first module in the order of execution whose output (or, backward, gradient) is
not finite; which op inside made it, and whether an earlier infinity was harmless, only a replay
can say.

Watching a loss scaler: `torch.amp.GradScaler` has no hooks, so the instance's own method is wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from instrument.results.ranges import TapReading
from instrument.results.schemas import FirstNonfinite, nonfinite_name
from kernels import TensorStats, multi_tensor_stats

SPELLED = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg", "absmax2": "exp_avg_sq"}
"""bitsandbytes' names. Its 8-bit states are integers with fp32 block scales (``absmax1``, ``absmax2``): an
overflow shows in the scales, so those stand for them."""


def first_bad(kind: str, tensors: list[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """``{kind}_tensor``, the index of the first non-finite tensor or -1, and ``{kind}_nan``, how many NaN it
    holds beyond its infinities: float64 scalars."""
    if not tensors or (device.type == "cpu" and _all_finite(tensors)):
        return {
            f"{kind}_tensor": torch.full((), -1.0, dtype=torch.float64, device=device),
            f"{kind}_nan": torch.zeros((), dtype=torch.float64, device=device),
        }
    return first_of(kind, multi_tensor_stats(tensors, counts="none"))


def first_of(kind: str, stats: TensorStats) -> dict[str, torch.Tensor]:
    """The same from statistics that were taken already."""
    index = stats.first_nonfinite_index
    surplus = (stats.nan - stats.inf).index_select(0, index.clamp(min=0).view(1)).squeeze(0)
    return {f"{kind}_tensor": index, f"{kind}_nan": surplus}


def prevailing(nan_surplus: float) -> str:
    """The kind of a tensor with ``nan_surplus`` more NaN than infinities."""
    return "nan" if nan_surplus > 0 else "inf"


def float_states(
    optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], names: list[str]
) -> list[tuple[str, str, torch.Tensor]]:
    """(parameter name, state name, tensor) of every floating-point state but step counters."""
    return [
        (name, SPELLED.get(key, key), value)
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(value) and value.is_floating_point() and key not in ("step", "qmap1", "qmap2")
    ]


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """On a CPU, where reading a number is free, a finite norm proves a list finite at a tenth of the cost."""
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).isfinite().all())


def surfaced(
    step: int,
    phase: str,
    tensor: str,
    kind: str,
    *,
    module: str | None = None,
    microbatch: int | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> FirstNonfinite:
    """A failure as the counters show it; op, cause and headroom are the replay's to fill."""
    return FirstNonfinite(
        step=step,
        microbatch=microbatch,
        phase=phase,
        phase_surfaced=phase,
        module=module,
        op=None,
        tensor=tensor,
        source_tensor=None,
        kind=kind,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        cause=None,
        input_absmax=None,
        headroom_bits=None,
        rank=rank,
    )


GRADIENTS = ("backward", "unscale", "clip", "update")
"""Where gradients are measured, in order."""
COLUMNS = (
    "loss",
    "loss_scale",
    "updated",
    *(f"{name}_{what}" for name in (*GRADIENTS, "state", "param") for what in ("tensor", "nan")),
)


class Surface:
    """One step's row of `COLUMNS` and its module readings. ``states``: (parameter name, state name)."""

    def __init__(
        self,
        step: int,
        row: dict[str, float],
        readings: Sequence[TapReading],
        names: Sequence[str],
        states: Sequence[tuple[str, str]],
    ) -> None:
        self.step, self.row, self.names, self.states = step, row, names, states
        self.bad = [r for r in readings if r.nan or r.inf]
        self.updated = row["updated"] > 0

    @property
    def bad_gradients(self) -> str | None:
        """Behind which of `GRADIENTS` they were first non-finite."""
        return next((name for name in GRADIENTS if self.row[f"{name}_tensor"] >= 0), None)

    @property
    def skipped(self) -> bool:
        """Non-finite gradients that no update followed."""
        return not self.updated and self.bad_gradients is not None

    def skip_detail(self) -> dict[str, object]:
        """What a scaler's skip was about."""
        found = self._in_forward() or self._in_gradients()
        scale = self.row["loss_scale"]
        return {
            "loss_scale": scale if scale >= 0 else None,
            "phase": found.phase,
            "module": found.module,
            "tensor": found.tensor,
            "kind": found.kind,
        }

    def first_nonfinite(self) -> FirstNonfinite | None:
        """The earliest phase that shows a failure; None for a healthy step, whatever infinities died out inside."""
        loss_failed = not math.isfinite(self.row["loss"])
        if loss_failed or (self.updated and self.bad_gradients is not None):
            return self._in_forward() or (self._loss() if loss_failed else self._in_gradients())
        for kind, phase_tensor in (("state", None), ("param", "param")):
            if self.row[f"{kind}_tensor"] >= 0:
                if not self.updated and (earlier := self._in_forward()):
                    return earlier  # it was there before this step
                index = int(self.row[f"{kind}_tensor"])
                name, tensor = (self.names[index], phase_tensor) if phase_tensor else self.states[index]
                return surfaced(
                    self.step, "optimizer", tensor, prevailing(self.row[f"{kind}_nan"]), module=name.rpartition(".")[0]
                )
        return None

    def _in_forward(self) -> FirstNonfinite | None:
        forward = [r for r in self.bad if r.direction == "fwd"]
        return self._at(innermost(forward), "forward", "output") if forward else None

    def _loss(self) -> FirstNonfinite:
        return surfaced(self.step, "loss", "output", nonfinite_name(self.row["loss"]))

    def _in_gradients(self) -> FirstNonfinite:
        where = self.bad_gradients
        backward = [r for r in self.bad if r.direction == "bwd"]
        if where == "backward" and backward:
            return self._at(innermost(backward), "backward", "grad")
        name = self.names[int(self.row[f"{where}_tensor"])]
        phase = {"update": "unscale_or_clip"}.get(where, where)
        return surfaced(self.step, phase, "grad", prevailing(self.row[f"{where}_nan"]), module=name.rpartition(".")[0])

    def _at(self, reading: TapReading, phase: str, tensor: str) -> FirstNonfinite:
        return surfaced(self.step, phase, tensor, prevailing(reading.nan - reading.inf), module=reading.module)


def innermost(readings: Sequence[TapReading]) -> TapReading:
    """The first of the readings in execution order, and of modules inside one another the inner one."""
    inner = [
        r for r in readings if not any(o.module.startswith(r.module + ".") or (not r.module and o.module) for o in readings)
    ]
    return min(inner, key=lambda r: r.called)


class StepRow:
    """Open between ``begin()`` and ``end()``; outside of that it measures nothing.

    ``names`` and ``parameters``: those that require a gradient, in the model's order; ``states``: (parameter
    name, state name, tensor) of the optimizer. Raises ValueError for a model with nothing to train.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to watch")
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.device = self.parameters[0].device
        self.states: list[tuple[str, str, torch.Tensor]] = []
        self._optimizer, self._scaler = optimizer, scaler
        self._states_of: tuple[object, int] = (None, 0)
        self._row: dict[str, torch.Tensor | float] = {}
        self._as_seen: list[tuple[int, int] | None] = []

    @property
    def open(self) -> bool:
        """Whether a step is under way."""
        return bool(self._row)

    def begin(self) -> None:
        """A step begins; what an interrupted one left is dropped."""
        self._as_seen = []
        self._row = {name: -1.0 if name.endswith("_tensor") else 0.0 for name in COLUMNS} | {"loss_scale": -1.0}

    def drop(self) -> None:
        """The step was interrupted: it has no row."""
        self._row = {}

    @torch.no_grad()
    def loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss."""
        self._row["loss"] = self._row["loss"] + loss.detach().double().sum().to(self.device)

    @torch.no_grad()
    def gradients(self, where: str) -> None:
        """The gradients behind ``backward``, ``unscale``, ``clip`` or just before the ``update``. Of several such
        places in a step (two backward passes with the gradients cleared between them) the first bad one counts."""
        if not self._row:
            return
        as_seen = [
            None if p.grad is None else (p.grad.data_ptr(), p.grad._version)
            for p in self.parameters
            if p.grad is None or p.grad.layout == torch.strided
        ]
        if len(as_seen) == len(self.parameters) and as_seen == self._as_seen:
            return  # nobody has written to them since they were last looked at
        self._as_seen = as_seen
        nothing = torch.empty(0, device=self.device)
        found = first_bad(where, [nothing if p.grad is None else countable(p.grad) for p in self.parameters], self.device)
        before = self._row[f"{where}_tensor"]
        if isinstance(before, torch.Tensor):
            found = {name: torch.where(before >= 0, self._row[name], value) for name, value in found.items()}
        self._row |= found

    @contextmanager
    def unscaling(self) -> Iterator[None]:
        """Around ``scaler.unscale_``."""
        self._note_scale()
        yield
        self.gradients("unscale")

    def updating(self) -> None:
        """Just before the optimizer's step. A fused optimizer unscales by itself and is called for a skipped step,
        too: then the scaler tells it so."""
        if not self._row:
            return
        self._note_scale()
        self.gradients("update")
        overflowed = getattr(self._optimizer, "found_inf", None)
        happens = 1.0 if overflowed is None else (overflowed.sum() == 0).double().to(self.device)
        self._row["updated"] = self._row["updated"] + happens

    @torch.no_grad()
    def end(self) -> torch.Tensor:
        """Parameters and states as the step leaves them; the row, float64, in the order of `COLUMNS`."""
        if self._optimizer is None and self._scaler is None:
            self._row["updated"] = 1.0  # by hand: no hook tells
        self._row |= first_bad("param", [countable(p) for p in self.parameters], self.device)
        self._refresh_states()
        self._row |= first_bad("state", [countable(tensor) for *_, tensor in self.states], self.device)
        values, self._row = [self._row[name] for name in COLUMNS], {}
        return torch.stack(
            [
                v.double() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float64, device=self.device)
                for v in values
            ]
        )

    def _note_scale(self) -> None:
        if self._row and self._scaler is not None:
            self._row["loss_scale"] = self._scaler.scale(torch.ones((), device=self.device))

    def _refresh_states(self) -> None:
        """States are made by the first update that is not skipped, and anew by ``load_state_dict``."""
        if self._optimizer is None:
            return
        of = (self._optimizer.state, sum(map(len, self._optimizer.state.values())))
        if of[0] is not self._states_of[0] or of[1] != self._states_of[1]:
            self.states, self._states_of = float_states(self._optimizer, self.parameters, self.names), of


def countable(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor where non-finite values are counted: a sparse one's values, a complex one's parts;
    of float64, which has a wider range, only whether each value is finite."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype == torch.float64:
        tensor = torch.where(tensor.isfinite(), 0.0, tensor).float()
    return tensor


class _Unscale:
    """``scaler.unscale_`` with others around it; a copy of the scaler gets the plain method, bound to itself."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.original: Callable | None = vars(scaler).get("unscale_")  # somebody else's replacement
        self.around: list[Callable[[], AbstractContextManager]] = []

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        with ExitStack() as stack:
            for around in self.around:
                stack.enter_context(around())
            (self.original or _plain(self.scaler))(optimizer)

    def __reduce__(self) -> tuple:
        return _plain, (self.scaler,)


def _plain(scaler: torch.amp.GradScaler) -> Callable:
    return type(scaler).unscale_.__get__(scaler)


def wrap_unscale(scaler: torch.amp.GradScaler, around: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Run every ``scaler.unscale_`` (``step`` calls it, too) inside ``around()``, whoever else wraps it; returns
    what undoes it, in any order."""
    wrapped = vars(scaler).get("unscale_")
    if not isinstance(wrapped, _Unscale):
        wrapped = scaler.unscale_ = _Unscale(scaler)
    wrapped.around.append(around)

    def remove() -> None:
        if around in wrapped.around:
            wrapped.around.remove(around)
        if not wrapped.around and vars(scaler).get("unscale_") is wrapped:
            del scaler.unscale_
            if wrapped.original is not None:
                scaler.unscale_ = wrapped.original

    return remove
