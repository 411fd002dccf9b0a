"""The state of a training run, kept in host memory, and put back into the same objects; and what a step showed.

``load_state_dict`` would not do: bitsandbytes' casts float states to the parameter's dtype, and
states made since would stay. So tensors are copied as they are, and what did not exist is removed.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from instrument.results.schemas import FirstNonfinite


class Seen(NamedTuple):
    """What a step showed that failed or was skipped: enough to know it again."""

    first: FirstNonfinite | None
    loss: float
    grad_norm: float | None
    updated: bool

    def same_as(self, other: Seen, tolerance: float) -> bool:
        """Same phase, tensor, module and kind, and the same loss and norm up to a relative ``tolerance``."""
        if self.first is None or other.first is None or self.updated != other.updated:
            return False
        place, other_place = ((f.phase, f.tensor, f.module, f.kind) for f in (self.first, other.first))
        return (
            place == other_place
            and _equal(self.loss, other.loss, tolerance)
            and _equal(self.grad_norm, other.grad_norm, tolerance)
        )


def _equal(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))


@dataclass(frozen=True)
class NamedState:
    """What a snapshot holds, by names that outlive the process.

    ``tensors``, in host memory: ``model/NAME`` (parameters and buffers, tied ones once),
    ``optimizer/NAME/KEY`` and ``random/...``. ``devices``: where an optimizer's tensor lives (``cpu`` or
    ``cuda``); ``aliases``: states that are the very tensor of another name (lookup tables). ``states``: what
    an optimizer keeps beside tensors, by parameter and key; ``groups``: its options, without parameters.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    devices: dict[str, str]
    aliases: dict[str, str]
    states: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    scaler: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, each once."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Snapshot:
    """Weights, buffers, gradients, optimizer states, loss scaler and random states (torch's, Python's, NumPy's)
    after ``step`` steps."""

    def __init__(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.step = step
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._tensors = [(t, _to_host(t)) for t in (*model.parameters(), *model.buffers())]
        self._buffers = [(m._buffers, name, held) for m in model.modules() for name, held in m._buffers.items()]
        self._gradients = {p: None if p.grad is None else _Held(p.grad) for p in _trained(model, optimizer)}
        self._states: dict[torch.Tensor, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._generators = _generators(optimizer)
        if optimizer is not None:
            self._states = {p: {k: _keep(v) for k, v in state.items()} for p, state in optimizer.state.items()}
            self._groups = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self._generator_states = [g.get_state() for g in self._generators]
        self._scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        self._python_random = random.getstate()
        self._numpy_random = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._cpu_random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it holds."""
        held = [held for state in self._states.values() for held in state.values()] + [*self._gradients.values()]
        return sum(t.nbytes for _, t in self._tensors) + sum(one.nbytes for one in held if isinstance(one, _Held))

    def named(self) -> NamedState:
        """What it holds, by name, for a file; waits for copies that are still under way."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        names = [f"model/{name}" for name in _model_tensors(self._model)]
        tensors = {name: host for name, (_, host) in zip(names, self._tensors, strict=True)}
        named = {parameter: name for name, parameter in self._model.named_parameters()}
        devices, aliases, first = {}, {}, {}
        states = {named[p]: {k: v for k, v in held.items() if not isinstance(v, _Held)} for p, held in self._states.items()}
        for parameter, held_state in self._states.items():
            for key, held in held_state.items():
                if isinstance(held, _Held):
                    name = f"optimizer/{named[parameter]}/{key}"
                    devices[name] = held.tensor.device.type
                    if first.setdefault(id(held.tensor), name) == name:
                        tensors[name] = held.host
                    else:
                        aliases[name] = first[id(held.tensor)]
        for kind, held in (("cpu", [self._cpu_random]), ("cuda", self._cuda_random), ("optimizer", self._generator_states)):
            tensors |= {f"random/{kind}/{i}": state for i, state in enumerate(held)}
        return NamedState(self.step, tensors, devices, aliases, states, self._groups, self._scale)

    @classmethod
    def from_named(
        cls,
        state: NamedState,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Snapshot:
        """A snapshot that puts ``state`` into other objects of the same make; raises `ValueError` when their
        tensors do not fit."""
        made = cls(state.step, model, optimizer, scaler)
        targets = _model_tensors(model)
        stored = {name.removeprefix("model/"): host for name, host in state.tensors.items() if name.startswith("model/")}
        if unlike := sorted(stored.keys() ^ targets.keys()) or [n for n, t in targets.items() if t.shape != stored[n].shape]:
            raise ValueError(f"the stored state is of another model: {unlike[0]} differs, one of {len(unlike)}")
        made._tensors = [(target, stored[name]) for name, target in targets.items()]
        made._gradients = dict.fromkeys(made._gradients)
        made._states, made._groups, made._scale = _held_states(state, model), state.groups, state.scaler
        made._cpu_random, made._cuda_random = state.tensors["random/cpu/0"], _numbered(state, "random/cuda/")
        made._generator_states = _numbered(state, "random/optimizer/")
        made._python_random = made._numpy_random = None
        return made

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; in another process (`from_named`) without gradients, Python's and NumPy's random state."""
        for tensor, host in self._tensors:
            tensor.copy_(host)
        for buffers, name, tensor in self._buffers:
            buffers[name] = tensor  # a module may have put another in its place
        for parameter, held in self._gradients.items():
            parameter.grad = None if held is None else held.restored()
        if self._optimizer is not None:
            for group, held in zip(self._optimizer.param_groups, self._groups, strict=True):
                group.update(copy.deepcopy(held))
            for parameter in list(self._optimizer.state):
                if parameter not in self._states:
                    del self._optimizer.state[parameter]
            for parameter, held_state in self._states.items():
                state = self._optimizer.state[parameter]
                for key in [key for key in state if key not in held_state]:
                    del state[key]
                for key, held in held_state.items():
                    state[key] = held.restored() if isinstance(held, _Held) else copy.deepcopy(held)
        if self._scaler is not None:
            _restore_scaler(self._scaler, self._scale)
        for generator, state in zip(self._generators, self._generator_states, strict=True):
            generator.set_state(state)
        if self._python_random is not None:
            random.setstate(self._python_random)
        if self._numpy_random is not None:
            sys.modules["numpy"].random.set_state(self._numpy_random)
        torch.set_rng_state(self._cpu_random)
        if self._cuda_random:
            torch.cuda.set_rng_state_all(self._cuda_random)


class _Held:
    """A state or gradient and its copy; goes back into the same memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.host = tensor, _to_host(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy; a sparse one's values and indices."""
        parts = (self.host,) if self.host.layout == torch.strided else (self.host._indices(), self.host._values())
        return sum(part.nbytes for part in parts)

    def restored(self) -> torch.Tensor:
        self.tensor.copy_(self.host)
        return self.tensor


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """The model's parameters and what else the optimizer updates, each once."""
    others = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    return list(dict.fromkeys([*model.parameters(), *others]))


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, then buffers, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _held_states(state: NamedState, model: torch.nn.Module) -> dict[torch.Tensor, dict[str, Any]]:
    """New optimizer states in the memory that each belongs in, in the order of the parameters."""
    parameters = dict(model.named_parameters())
    held = {n: _Held(state.tensors[n].to(device, copy=True)) for n, device in state.devices.items() if n not in state.aliases}
    held |= {name: held[first] for name, first in state.aliases.items()}
    states = {parameters[name]: dict(plain) for name, plain in state.states.items()}
    for name, one in held.items():
        parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
        states[parameters[parameter]][key] = one
    return states


def _numbered(state: NamedState, prefix: str) -> list[torch.Tensor]:
    found = [name for name in state.tensors if name.startswith(prefix)]
    return [state.tensors[f"{prefix}{i}"] for i in range(len(found))]


def _keep(value: Any) -> Any:
    return _Held(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU into pinned memory, queued after the work so far, without a sync."""
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def _restore_scaler(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """A scaler's state, its per-step bookkeeping dropped: an interrupted step leaves ``unscaled`` in it."""
    if state:
        scaler.load_state_dict(state)
        if scaler._scale is not None:
            scaler._scale.fill_(state["scale"])
            scaler._growth_tracker.fill_(state["_growth_tracker"])
    scaler._per_optimizer_states.clear()


def _generators(optimizer: torch.optim.Optimizer | None) -> list[torch.Generator]:
    """Random generators that an optimizer owns (stochastic rounding)."""
    return [value for value in vars(optimizer).values() if isinstance(value, torch.Generator)] if optimizer else []
