"""The losses' route for small logits on a CPU: eager torch's own loss inside ordinary autograd.

There a call costs more than its arithmetic: an autograd function in Python, a registered operator and the
bookkeeping of chunks take 90 us, eager torch 17 us in all. Gradients are then made in the backward pass, so
that they may be asked for twice. Each loss has its own route in its `reference.py`; this file holds what they share.
"""

import math
from functools import lru_cache

import torch
from torch.compiler import is_compiling

from kernels.dispatch import operators_watched

# Elements up to which eager torch is the quicker one, found by timing both routes on one core of an EPYC:
# beyond, its temporaries leave the cache, and chunks win.
SMALL = {torch.float32: 2**20, torch.bfloat16: 2**20, torch.float16: 2**20}


def is_small(logits: torch.Tensor, impl: str, inplace_grad: bool) -> bool:
    """Whether a call may take this route. Never where something watches operators: it should see ours."""
    return (
        isinstance(logits, torch.Tensor)
        and 0 < logits.numel() <= SMALL.get(logits.dtype, 0)
        and logits.dim() == 2
        and logits.is_cpu
        and not inplace_grad
        and impl in ("auto", "torch")
        and not is_compiling()
        and not operators_watched()
    )


def number(x: int | float | torch.Tensor) -> float:
    """A factor as a number: looking at a CPU tensor is no sync."""
    return float(x.item() if isinstance(x, torch.Tensor) else x)


def reachable(loss_factor: float, grad_factor: float) -> bool:
    """Whether `with_value` can divide the one out and multiply the other in without leaving fp32's range."""
    return loss_factor == grad_factor or 2.0**-60 < grad_factor < 2.0**60


@lru_cache(maxsize=16)
def constant(value: float, *shape: int) -> torch.Tensor:
    """A tensor full of `value`: a run has few factors, and a new one would cost a microsecond a call."""
    with torch.inference_mode(False):  # or it could never be saved for a backward pass
        return torch.full(shape, value)


def with_value(scaled: torch.Tensor, loss_factor: float, grad_factor: float) -> torch.Tensor:
    """`scaled` = grad_factor * sum, whose gradient is right, with its value set to loss_factor * sum."""
    if loss_factor != grad_factor:
        scaled.data.fill_(scaled.item() * (loss_factor / grad_factor))  # .data: no node of the graph reads the value
    return scaled


def is_usual_scalar(x: int | float | torch.Tensor) -> bool:
    """Whether a normalizer or grad_scale needs no message: a number above 0, or one element on the CPU."""
    if isinstance(x, torch.Tensor):
        return x.is_cpu and x.numel() == 1 and 0 < x.item() < math.inf
    return isinstance(x, (int, float)) and 0 < x < math.inf
