"""Writes past the dispatcher: through NumPy, through a pointer as a C extension does, by Triton kernels."""

import ctypes
import math

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.fused_loss import sum_rows
from tests.instrument.pathologies.planted import HALF, SINGLE, Pathology

WRITE = "ddb.unrecorded_write"
NAN, INF = math.nan, math.inf


def numpy_write(tensor, value):
    tensor.detach().numpy().reshape(-1)[1] = value
    return tensor


def pointer_write(tensor, value):
    ctypes.c_float.from_address(tensor.data_ptr()).value = value
    return tensor


def numpy_log(x, out):
    with np.errstate(all="ignore"):
        np.log(x.detach().numpy(), out=out.numpy())
    return out


def numpy_exp(x):
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.exp(x.detach().numpy()))


@triton.jit
def multiply(source, out, factor, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i, mask=i < n) * factor, mask=i < n)


def tripled(x, factor, out=None):
    """A kernel launched by hand."""
    out = torch.empty_like(x) if out is None else out
    multiply[(1,)](x.detach(), out, factor, x.numel(), BLOCK=8)
    return out


class Custom(torch.autograd.Function):
    """Both passes by NumPy; ``scale`` of the gradient."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        out = torch.empty_like(x)
        np.multiply(x.detach().numpy(), 1.0, out=out.numpy())
        return out

    @staticmethod
    def backward(ctx, gradient):
        out = torch.empty_like(gradient)
        with np.errstate(all="ignore"):
            np.multiply(gradient.numpy(), ctx.scale, out=out.numpy())
        return out, None


def in_b(function):
    return lambda net, x: net.b(lambda x: function(net, x), x)


def read_in_c(function):
    """Written in ``b``, read in ``c``."""
    return lambda net, x: net.c(lambda y, x: y * x, net.b(lambda x: function(net, x), x), x)


def overflow(net, x):
    return net.b(lambda x: x * net.huge() * 4, x)


def written(name, run, op=WRITE, cause=None, **known):
    return Pathology(f"write: {name}", known.pop("dtype", SINGLE), run, op, cause, **known)


PATHOLOGIES = [
    written("memory of empty", in_b(lambda net, x: x * numpy_write(torch.empty(2, 4).fill_(1), NAN))),
    written("memory of empty, all of it", in_b(lambda net, x: x + numpy_log(-x, torch.empty(2, 4)))),
    written("memory of zeros", in_b(lambda net, x: x * numpy_write(torch.zeros(2, 4), INF))),
    written("memory of empty_like", in_b(lambda net, x: x * numpy_log(x - 2, torch.empty_like(x)))),
    written("an activation", in_b(lambda net, x: numpy_write(x + 1, NAN) * 2)),
    written("an activation, minus infinity", in_b(lambda net, x: numpy_write(x + 1, -INF) * 2)),
    written("an fp16 activation", in_b(lambda net, x: numpy_write(x + 1, NAN) * 2), dtype=HALF),
    written("through a pointer", in_b(lambda net, x: pointer_write(x + 1, NAN) * 2)),
    written("through a pointer to empty memory", in_b(lambda net, x: pointer_write(torch.empty(2, 4).fill_(0), INF) + x)),
    written("what another module reads", read_in_c(lambda net, x: numpy_write(torch.ones(2, 4), NAN))),
    written("what another module reads, empty", read_in_c(lambda net, x: numpy_log(x - 2, torch.empty(2, 4)))),
    written("what another module reads, by a pointer", read_in_c(lambda net, x: pointer_write(torch.ones(2, 4), NAN))),
    written("an argument", lambda net, x: net.c(lambda y: y * 2, net.b(lambda y: numpy_write(y, NAN), x * 3))),
    written("between modules", lambda net, x: net.c(lambda y: y * 2, numpy_write(net.b(lambda y: y * 3, x), NAN)), module=""),
    written("a slice", in_b(lambda net, x: x * numpy_write(torch.ones(4, 4), NAN)[:2])),
    written(
        "a slice that others share", in_b(lambda net, x: (lambda t: x * t[:2] + numpy_write(t, NAN)[:2])(torch.ones(4, 4)))
    ),
    written("a weight", in_b(lambda net, x: x * numpy_write(net.b.weight, NAN))),
    written("a buffer", in_b(lambda net, x: x @ numpy_write(net.b.tril, NAN))),
    written("made by NumPy", in_b(lambda net, x: x * numpy_exp(x * 1000)), "aten.lift_fresh"),
    written("the model's output", lambda net, x: numpy_write(x * 2, NAN), module=""),
    written("twice", in_b(lambda net, x: numpy_write(numpy_write(x + 1, 5.0) * 2, NAN) * 2)),
    written(
        "a gradient, before the update",
        lambda net, x: x,
        module="",
        phase="clip",
        update=lambda net: numpy_write(net.x.grad, NAN),
    ),
    written("the gradient of a custom function", in_b(lambda net, x: Custom.apply(x, NAN)), phase="backward"),
    written("an overflow in a custom gradient", in_b(lambda net, x: Custom.apply(x, 3e38) * 4), phase="backward"),
    written("healthy", in_b(lambda net, x: x * numpy_write(torch.empty(2, 4).fill_(1), 3.0)), None),
    written("healthy, empty", in_b(lambda net, x: x * numpy_log(x, torch.empty(2, 4))), None),
    written(
        "healthy, a mask",
        in_b(lambda net, x: torch.softmax(x + numpy_log(x.detach() * 0, torch.empty(2, 4)).triu(1), -1)),
        None,
    ),
    written("healthy, repaired", in_b(lambda net, x: x * numpy_write(torch.ones(2, 4), NAN).nan_to_num(0.0)), None),
    written(
        "healthy, over a NaN",
        in_b(lambda net, x: x * numpy_write(torch.ones(8).index_fill(0, torch.tensor([1]), NAN), 2.0).view(2, 4)),
        None,
    ),
    written(
        "an overflow that it passes on",
        lambda net, x: net.c(lambda y: x + torch.from_numpy(y.detach().numpy() * 2), overflow(net, x)),
        "aten.mul",
        "overflow",
    ),
    written(
        "an overflow that it copies",
        lambda net, x: net.c(lambda y: x + numpy_log(y, torch.empty(2, 4)), overflow(net, x)),
        "aten.mul",
        "overflow",
    ),
    written(
        "NaN that it copies",
        lambda net, x: net.c(lambda y: x + numpy_log(y, torch.empty(2, 4)), net.b(torch.log, -x)),
        "aten.log",
        "invalid",
    ),
    written(
        "an overflow that a number of Python's passes on",
        lambda net, x: net.c(lambda y: x * y.max().item(), overflow(net, x)),
        "aten.mul",
        "overflow",
    ),
    written(
        "an overflow beside a mask that is written down",
        lambda net, x: net.c(lambda y: x.masked_fill(x < y.max().item(), -INF).exp() * y, overflow(net, x)),
        "aten.mul",
        "overflow",
    ),
    written("before an overflow", lambda net, x: net.c(lambda y: y * 1e38 * 1e38, net.b(lambda y: numpy_write(y, NAN), x * 3))),
    written("after an overflow", lambda net, x: net.c(lambda y: numpy_write(y, NAN), overflow(net, x)), "aten.mul", "overflow"),
    written("beside an overflow that died", in_b(lambda net, x: (x * 3e38 * 4).sigmoid() * numpy_write(torch.ones(2, 4), NAN))),
    written("a kernel's overflow", in_b(lambda net, x: x + tripled(x, 3e38 * 3)), "triton.multiply", "overflow"),
    written("a kernel's infinity times zero", in_b(lambda net, x: x + tripled(x * 0, INF)), "triton.multiply", "invalid"),
    written("a kernel in place", in_b(lambda net, x: (lambda y: x + tripled(y, NAN, y))(x * 2)), "triton.multiply", "invalid"),
    written(
        "a kernel's output in another module", read_in_c(lambda net, x: tripled(x * 2, 3e38)), "triton.multiply", "overflow"
    ),
    written(
        "an overflow that a kernel passes on",
        lambda net, x: net.c(lambda y: x + tripled(y, 2.0), overflow(net, x)),
        "aten.mul",
        "overflow",
    ),
    written("a healthy kernel", in_b(lambda net, x: x + tripled(x, 2.0)), None),
    written("an overflow after a kernel", in_b(lambda net, x: (x + tripled(x, 2.0)) * 3e38), "aten.mul", "overflow"),
    written(
        "a sum of row losses",
        in_b(lambda net, x: x + sum_rows(torch.full((4,), 3e38), 1.0, "triton")),
        "triton.sum_rows",
        "overflow",
    ),
    written(
        "a sum of row losses, scaled",
        in_b(lambda net, x: x + sum_rows(x.detach().view(-1), torch.full((), 1e38), "triton")),
        "triton.sum_rows",
        "overflow",
    ),
    written(
        "a NaN that a sum of row losses passes on",
        lambda net, x: net.c(lambda y: x + sum_rows(y.detach().view(-1), 1.0, "triton"), net.b(torch.log, -x)),
        "aten.log",
        "invalid",
    ),
    written(
        "a sum of row losses in torch",
        in_b(lambda net, x: x + sum_rows(torch.full((4,), 3e38), 1.0, "torch")),
        "aten._to_copy",
        "overflow",
    ),
]
PATHOLOGIES += [
    written("a number of Python's", in_b(lambda net, x: x * torch.tensor(NAN)), "aten.mul", "invalid"),
    written("numbers of Python's", in_b(lambda net, x: x * torch.tensor([NAN] * 4)), "aten.lift_fresh"),
]
