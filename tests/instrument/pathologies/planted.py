"""Small models with one fault each, whose producer is known by construction: the line that was planted.

A pathology declares the op, phase, module and cause that must be named, or that nothing must be. `oracle` holds it against a
run of the same code in float64, which knows nothing of replays: an overflow and an underflow are healed there, an invalid
operation is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

TINY = {torch.float16: 1e-5, torch.bfloat16: 1e-30, torch.float32: 1e-30, torch.float64: 1e-30}
"""Its square is zero in the dtype, and not in float64."""
HUGE = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 3e38}
"""Twice it is infinite in the dtype, and not in float64."""
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class At(nn.Module):
    """Runs a function under this module's name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("limit", torch.full((4,), torch.inf))
        self.register_buffer("tril", torch.ones(4, 4).tril())

    def forward(self, function: Callable, *args: torch.Tensor) -> torch.Tensor:
        return function(*args)


class Net(nn.Module):
    """``x``, a learned (2, 4) tensor of ones, and places ``a``, ``b``, ``c`` to run code in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, 4))
        self.a, self.b, self.c = At(), At(), At()
        self.to(dtype)
        self.dtype, self.narrow = dtype, dtype
        self.microbatch = 0
        upper = torch.ones(2, 4).tril() == 0
        self.plain = {value: torch.zeros(2, 4, dtype=dtype).masked_fill(upper, value) for value in (torch.inf, -torch.inf)}

    def tiny(self) -> float:
        return TINY[self.narrow]

    def huge(self) -> float:
        return HUGE[self.narrow]

    def new(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=self.dtype)

    def forward(self, run: Callable) -> torch.Tensor:
        return run(self, self.x * 1)


@dataclass(frozen=True)
class Pathology:
    """``run(net, x)`` gives what the loss sums. ``op`` None: nothing must be named. ``in_float64``: whether the same code
    stays finite in float64 (None: not asked). ``update(net)`` runs between backward and the optimizer's step."""

    name: str
    dtype: torch.dtype
    run: Callable
    op: str | None
    cause: str | None
    module: str | None = "b"
    phase: str = "forward"
    microbatch: int | None = None
    microbatches: int = 1
    optimizer: Callable | None = None
    update: Callable = field(default=lambda net: None)
    in_float64: bool | None = None

    @property
    def expected(self) -> tuple | None:
        return None if self.op is None else (self.op, self.phase, self.module, self.cause)

    def made(self, dtype: torch.dtype | None = None) -> tuple[Net, torch.optim.Optimizer | None, Callable]:
        """The model, its optimizer and a function that runs the step."""
        net = Net(dtype or self.dtype)
        net.narrow = self.dtype
        optimizer = self.optimizer and self.optimizer(net)

        def step(number: int = 1, recorder: object = None) -> list[torch.Tensor]:
            losses = []
            for net.microbatch in range(self.microbatches):
                out = net(self.run)
                losses.append((out if out.dtype == DOUBLE else out.float()).sum())
                if recorder is not None:
                    recorder.loss(losses[-1])
                if losses[-1].requires_grad:
                    losses[-1].backward()
            self.update(net)
            left = [*losses, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
            if optimizer is not None:
                optimizer.step()
            net.zero_grad()
            return [*left, *net.parameters()]

        return net, optimizer, step


def survives(pathology: Pathology, dtype: torch.dtype) -> bool:
    """Whether losses, gradients and parameters of the step are finite when it runs in ``dtype``, without any instrument."""
    torch.manual_seed(0)
    _, _, step = pathology.made(dtype)
    return all(bool(tensor.isfinite().all()) for tensor in step())


def each_dtype(dtypes, *rows: tuple, **common: object) -> list[Pathology]:
    """Rows of (name, run, op, cause) in every one of ``dtypes``."""
    return [
        Pathology(f"{name} ({str(dtype).removeprefix('torch.')})", dtype, run, op, cause, **common)
        for dtype in dtypes
        for name, run, op, cause in rows
    ]
