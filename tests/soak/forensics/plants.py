"""What an injection trial plants: a fault in one module (or in the optimizer, or in unscaling) at one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

PLANTS = (
    "forward_nan",
    "forward_inf",
    "overflow_weight",
    "backward_nan",
    "backward_inf",
    "state_nan",
    "state_inf",
    "underflow_then_divide",
    "unscale",
)


@dataclass
class Planted:
    """What the plant does in a step, and where its fault should be found. ``module`` None: outside of modules."""

    phase: str
    module: str | None
    begin: Callable[[int], None] = lambda step: None
    before_update: Callable[[int], None] = lambda step: None
    unscale_by: Callable[[int], float] = lambda step: 1.0


def plant(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, module: str, at: int) -> Planted:
    """Arm ``kind`` in ``module`` for step ``at``. It acts again whenever that step is run again."""
    where = dict(model.named_modules(remove_duplicate=True))[module]
    if kind.startswith("forward"):
        return _in_forward(where, module, at, float(kind.rpartition("_")[2]))
    if kind.startswith("backward"):
        return _in_backward(where, module, at, float(kind.rpartition("_")[2]))
    if kind == "overflow_weight":
        return _overflow(where, module, at)
    parameter = next(p for p in where.parameters(recurse=False) if p.requires_grad)
    if kind == "unscale":
        return Planted("unscale", module, unscale_by=lambda step: math.inf if step == at else 1.0)  # 1 / a scale of 0
    if kind == "underflow_then_divide":
        return _underflow(parameter, optimizer, module, at)
    return _in_state(parameter, optimizer, module, at, float(kind.rpartition("_")[2]))


def _spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one element replaced."""
    spoiled = tensor.clone()
    spoiled[tuple(size // 2 for size in tensor.shape)] = value
    return spoiled


def _on_first_tensor(output, change):
    """``output`` with its first floating-point tensor changed; nested outputs keep their form."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, dict):
        key = next(iter(output))
        output[key] = _on_first_tensor(output[key], change)
        return output
    return type(output)([_on_first_tensor(output[0], change), *output[1:]])


def _wrap(where: nn.Module, active: Callable[[], bool], change) -> None:
    """Change the module's own result, underneath every hook, as a defect in its code would."""
    forward = where.forward

    def wrapped(*args, **kwargs):
        out = forward(*args, **kwargs)
        return _on_first_tensor(out, change) if active() else out

    where.forward = wrapped


def _in_forward(where: nn.Module, name: str, at: int, value: float) -> Planted:
    now = {"step": 0}
    _wrap(where, lambda: now["step"] == at, lambda tensor: _spoiled(tensor, value))
    return Planted("forward", name, begin=lambda step: now.update(step=step))


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _spoiled(gradient, ctx.value), None


def _in_backward(where: nn.Module, name: str, at: int, value: float) -> Planted:
    now = {"step": 0}
    _wrap(where, lambda: now["step"] == at and torch.is_grad_enabled(), lambda tensor: _SpoilGradient.apply(tensor, value))
    return Planted("backward", name, begin=lambda step: now.update(step=step))


def _overflow(where: nn.Module, name: str, at: int) -> Planted:
    """At the step, the weight grows so large that products with it overflow its dtype."""
    weight = where.weight

    def grow(step: int) -> None:
        if step == at:
            with torch.no_grad():
                weight.copy_(weight.sign() * torch.finfo(weight.dtype).max * 0.9)

    return Planted("forward", name, begin=grow)


def _in_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, name: str, at: int, value: float) -> Planted:
    def spoil(step: int) -> None:
        state = optimizer.state.get(parameter, {})
        if step == at and "exp_avg" in state:
            state["exp_avg"].view(-1)[0] = value

    return Planted("optimizer", name, before_update=spoil)


def _underflow(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, name: str, at: int) -> Planted:
    """The gradient of one parameter shrinks until its square is zero, and its epsilon is too small to count."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    group["params"] = [p for p in group["params"] if p is not parameter]
    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": [parameter]})
    mine = optimizer.param_groups[-1]
    eps = mine["eps"]
    small = torch.finfo(parameter.dtype).tiny ** 0.75

    def shrink(step: int) -> None:
        mine["eps"] = eps if step != at else torch.finfo(parameter.dtype).smallest_normal * 1e-30
        if step == at:
            with torch.no_grad():
                parameter.grad.copy_(torch.full_like(parameter.grad, small))
                state = optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    state["exp_avg_sq"].zero_()

    return Planted("optimizer", name, before_update=shrink)
