"""What `python -m kernels bench` and `check` ask of the scans along a sequence.

Bench: 8,192 tokens of a tiny model's width on a CPU, of GPT-2's width on a GPU, forward alone and with its backward pass.
Check: outputs, states and every gradient against the definition in float64.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernels.bench import BenchArm, own_name, timed
from kernels.check import Judged, of_bound
from kernels.dispatch import DTYPES
from kernels.resolvent_mix import bytes_moved as resolvent_bytes
from kernels.resolvent_mix import reference as resolvent_reference
from kernels.resolvent_mix import resolvent_mix
from kernels.selective_scan import bytes_moved as selective_bytes
from kernels.selective_scan import reference as selective_reference
from kernels.selective_scan import selective_scan

BENCHED = {"cuda": (8, 8192, 768), "cpu": (1, 8192, 64)}
SELECTIVE_BENCHED = {"cuda": (8, 8192, 1536, 16), "cpu": (1, 8192, 128, 16)}
CHECKED = {"cuda": (2, 4133, 130), "cpu": (2, 1037, 5), "interpreted": (1, 9, 5)}
"""Batch, tokens, channels, of a selective scan with `STATES` numbers each. Long enough for many chunks; Triton's interpreter
needs a second for a dozen tokens."""
STATES = 4
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES.values()}
OF_LARGEST = 3e-5
"""Error of an fp32 scan that is allowed, as a share of the quantity's largest value."""


def resolvent_inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, ...]:
    """u, h, t, eta, g and y of the size that a trained mixer has, with eta down to 0.02."""
    u, h, t = (torch.randn(batch, tokens, channels, device=device) for _ in range(3))
    eta = torch.logspace(-1.7, 0, channels, device=device)
    g, y = (torch.randn(batch, 2, channels, device=device) for _ in range(2))
    g[:, 1] = g[:, 1].abs()
    return u.to(dtype), h.to(dtype), torch.sigmoid(t + 2).to(dtype), eta, g, y


def _call_resolvent(u, h, t, eta, g, y, impl="auto"):
    out, state = resolvent_mix(u, h, t, eta, (g, y), impl=impl)
    return out, *state


def _both_passes(call: Callable, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The gradients of all inputs, given a gradient of 1 for every output."""
    leaves = [x.requires_grad_() for x in inputs]
    return torch.autograd.grad([x.sum() for x in call(*leaves)], leaves)


def _arms(op: str, device: str, dtype: str, shape: str, inputs: Callable, call: Callable, definition: Callable, bytes_moved):
    """Ours against the definition (on a GPU against plain torch in chunks), forward, and forward and backward."""

    def forward(way):
        return timed(inputs, torch.no_grad()(lambda x: way(*x)))

    def both(way):
        return timed(inputs, partial(_both_passes, way))

    name = own_name(device)
    other, way = ("torch", partial(call, impl="torch")) if device == "cuda" else ("definition", definition)
    yield BenchArm(op, f"{dtype} {shape} forward", name, forward(call), bytes_moved())
    yield BenchArm(op, f"{dtype} {shape} forward", other, forward(way), 0)
    yield BenchArm(op, f"{dtype} {shape}", name, both(call), bytes_moved() + bytes_moved(backward=True))
    if device == "cuda" or dtype == "fp32":  # seconds a call
        yield BenchArm(op, f"{dtype} {shape}", other, both(way), 0)


def _judge(
    inputs: tuple[torch.Tensor, ...], call: Callable, definition: Callable, names: tuple[str, ...], outputs: int, case: str
):
    """Outputs and gradients by `call` against the definition's in float64, of the same rounded inputs."""
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    want, got = definition(*exact), call(*leaves)
    given = [torch.randn_like(x) for x in got]
    want += torch.autograd.grad(want, exact, [x.double() for x in given])
    got += torch.autograd.grad(got, leaves, given)
    for name, g, w in zip((*names[:outputs], *(f"gradient of {n}" for n in names[outputs:])), got, want, strict=True):
        bound = OF_LARGEST * w.abs().max() + EPSILON[g.dtype] * w.abs()
        yield Judged(case, name, *of_bound((g.double() - w).abs(), bound))


def _checked(device: torch.device, impl: str) -> tuple[int, int, int]:
    return CHECKED["interpreted" if impl == "triton" and device.type == "cpu" else device.type]


def resolvent_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    batch, tokens, channels = BENCHED[device]
    inputs = partial(resolvent_inputs, *BENCHED[device], DTYPES[dtype], device)
    size = partial(resolvent_bytes, *BENCHED[device], DTYPES[dtype].itemsize)
    definition = resolvent_reference.definition
    yield from _arms("resolvent_mix", device, dtype, f"{tokens}x{channels}", inputs, _call_resolvent, definition, size)


def resolvent_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    shape = _checked(device, impl)
    names = ("outputs", "state g", "state y", "u", "h", "t", "eta", "state g", "state y")
    call, case = partial(_call_resolvent, impl=impl), "x".join(map(str, shape))
    inputs = resolvent_inputs(*shape, dtype, device)
    yield from _judge(inputs, call, resolvent_reference.definition, names, 3, case)


def selective_inputs(batch: int, tokens: int, channels: int, states: int, dtype: torch.dtype, device):
    """u, delta, A, B, C, D and state, as Mamba begins: A = -1, -2, ..., steps of 0.001 to 0.1 and, by the token, beyond."""
    u, delta, B, C = (torch.randn(batch, tokens, width, device=device) for width in (channels, channels, states, states))
    delta = torch.nn.functional.softplus(delta + torch.linspace(-7, -2.2, channels, device=device))
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    D, state = 1 + 0.1 * torch.randn(channels, device=device), torch.randn(batch, channels, states, device=device)
    return u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), D, state


def selective_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    shape = SELECTIVE_BENCHED[device]
    inputs = partial(selective_inputs, *shape, DTYPES[dtype], device)
    size = partial(selective_bytes, *shape, DTYPES[dtype].itemsize)
    name = "x".join(map(str, shape[1:]))
    yield from _arms("selective_scan", device, dtype, name, inputs, selective_scan, selective_reference.definition, size)


def selective_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    shape = *_checked(device, impl), STATES
    names = ("outputs", "state", "u", "delta", "A", "B", "C", "D", "state")
    call, case = partial(selective_scan, impl=impl), "x".join(map(str, shape))
    inputs = selective_inputs(*shape, dtype, device)
    yield from _judge(inputs, call, selective_reference.definition, names, 2, case)


ARMS = {"resolvent_mix": resolvent_arms, "selective_scan": selective_arms}
CHECKS = {"resolvent_mix": resolvent_checks, "selective_scan": selective_checks}
