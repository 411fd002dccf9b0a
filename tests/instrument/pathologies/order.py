"""Several faults in one step, of which the first in execution is named, and faults after the gradients."""

import math

import torch

from tests.instrument.pathologies.planted import BRAIN, HALF, SINGLE, Pathology, each_dtype

OVERFLOW, INVALID, UNDERFLOW = "overflow", "invalid", "underflow_then_divide"


def grown(net, x, factor):
    """``x * factor`` in ``b`` whose value dies and whose gradient, ``factor`` times 4, overflows where ``factor`` is huge."""
    return net.c(lambda y: (y - y.detach()) * factor, net.b(lambda x: x * 4, x))


def backward_overflow(net, x):
    return grown(net, x, net.huge())


def logarithm(net, x):
    return net.a(lambda x: (-x).log(), x)


def overflow(net, x):
    return net.a(lambda x: x * net.huge() * 4, x)


def healthy(net, x):
    return net.b(lambda x: x * 2, x)


def absorbed(net, x):
    return net.b(lambda x: (x.detach() * net.huge() * 4).sigmoid() * x, x)


def forces(x):
    """A module that differentiates, as force fields do."""
    place = x.detach().requires_grad_()
    return x + torch.autograd.grad((place * 3).square().sum(), place)[0]


def spoilt_forces(x):
    place = x.detach().requires_grad_()
    return x + torch.autograd.grad((place * 0).sqrt().sum(), place)[0]


def in_turn(*runs):
    """One of ``runs`` for each micro-batch."""
    return lambda net, x: runs[net.microbatch](net, x)


FIRST = (
    ("a gradient, then a loss", (backward_overflow, logarithm), ("aten.mul", OVERFLOW, "b", "backward", 0)),
    ("a gradient, then an output", (backward_overflow, overflow), ("aten.mul", OVERFLOW, "b", "backward", 0)),
    ("a gradient, then a gradient", (backward_overflow, backward_overflow), ("aten.mul", OVERFLOW, "b", "backward", 0)),
    ("a gradient in the middle", (healthy, backward_overflow, logarithm), ("aten.mul", OVERFLOW, "b", "backward", 1)),
    ("a loss, then a gradient", (logarithm, backward_overflow), ("aten.log", INVALID, "a", "forward", 0)),
    ("a loss, then a loss", (overflow, logarithm), ("aten.mul", OVERFLOW, "a", "forward", 0)),
    ("the last of three", (healthy, healthy, logarithm), ("aten.log", INVALID, "a", "forward", 2)),
    ("the last gradient of three", (healthy, healthy, backward_overflow), ("aten.mul", OVERFLOW, "b", "backward", 2)),
    ("one that dies, then a gradient", (absorbed, backward_overflow), ("aten.mul", OVERFLOW, "b", "backward", 1)),
    ("one that dies, then a loss", (absorbed, logarithm), ("aten.log", INVALID, "a", "forward", 1)),
    ("a gradient, then one that dies", (backward_overflow, absorbed), ("aten.mul", OVERFLOW, "b", "backward", 0)),
    ("ones that die", (absorbed, absorbed), (None, None, None, "forward", None)),
)


def update(change):
    """Changes the gradient of ``x`` before the optimizer's step."""

    def changed(net):
        with torch.no_grad():
            change(net.x.grad, net)

    return changed


def adam(**options):
    return lambda net: torch.optim.AdamW(net.parameters(), **{"lr": 1e-3, "foreach": True} | options)


def other(kind, **options):
    return lambda net: kind(net.parameters(), **{"lr": 1e-3, "foreach": True} | options)


def with_optimizer(name, dtype, optimizer, op, cause, change=lambda gradient, net: None, phase="optimizer", module="", **known):
    return Pathology(
        f"update: {name} ({str(dtype).removeprefix('torch.')})", dtype, healthy, op, cause, module, phase,
        optimizer=optimizer, update=update(change), **known,
    )  # fmt: skip


def zero(gradient, net):
    gradient.zero_()


def small(gradient, net):
    gradient.mul_(net.tiny())


def large(gradient, net):
    gradient.fill_(net.huge())


def repaired(gradient, net):
    gradient.mul_(math.inf).nan_to_num_(0.0, 0.0, 0.0)


def by_norm(gradient, net):
    gradient.zero_().div_(gradient.norm())


optim = torch.optim
FOREACH, LOOP = "aten._foreach_addcdiv_", "aten.addcdiv_"
loop, amsgrad, fused = {"foreach": False}, {"amsgrad": True}, {"foreach": False, "fused": True}
UPDATES = [
    with_optimizer("epsilon 0, gradients 0", SINGLE, adam(eps=0.0), FOREACH, INVALID, zero, in_float64=False),
    with_optimizer("epsilon 0, gradients 0", HALF, adam(eps=0.0), FOREACH, INVALID, zero, in_float64=False),
    with_optimizer("epsilon 0, gradients 0, loop", SINGLE, adam(eps=0.0, **loop), LOOP, INVALID, zero),
    with_optimizer("epsilon 0, gradients 0, amsgrad", SINGLE, adam(eps=0.0, **amsgrad), FOREACH, INVALID, zero),
    with_optimizer("epsilon 0, gradients 0, fused", SINGLE, adam(eps=0.0, **fused), "aten._fused_adamw_", INVALID, zero),
    with_optimizer("epsilon 0, small gradients", SINGLE, adam(eps=0.0), FOREACH, UNDERFLOW, small, in_float64=True),
    with_optimizer("epsilon 0, small gradients", BRAIN, adam(eps=0.0), FOREACH, UNDERFLOW, small, in_float64=True),
    with_optimizer("epsilon 0, small gradients, loop", SINGLE, adam(eps=0.0, **loop), LOOP, UNDERFLOW, small),
    with_optimizer("epsilon 0, small gradients, amsgrad", SINGLE, adam(eps=0.0, **amsgrad), FOREACH, UNDERFLOW, small),
    with_optimizer("an epsilon that underflows", HALF, adam(), FOREACH, UNDERFLOW, small, in_float64=True),
    with_optimizer("an epsilon that underflows, gradients 0", HALF, adam(), FOREACH, UNDERFLOW, zero, in_float64=True),
    with_optimizer("an epsilon that underflows, loop", HALF, adam(**loop), LOOP, UNDERFLOW, small),
    with_optimizer("large gradients", HALF, adam(), "aten._foreach_addcmul_", OVERFLOW, large),
    with_optimizer("large gradients, loop", HALF, adam(**loop), "aten.addcmul_", OVERFLOW, large),
    with_optimizer("RMSprop, gradients 0", SINGLE, other(optim.RMSprop, eps=0.0), FOREACH, INVALID, zero),
    with_optimizer("RMSprop, small gradients", SINGLE, other(optim.RMSprop, eps=0.0), FOREACH, UNDERFLOW, small),
    with_optimizer("Adagrad, gradients 0", SINGLE, other(optim.Adagrad, eps=0.0), FOREACH, INVALID, zero),
    with_optimizer("Adagrad, small gradients", SINGLE, other(optim.Adagrad, eps=0.0), FOREACH, UNDERFLOW, small),
    with_optimizer("SGD, a large step", SINGLE, other(optim.SGD, lr=9.0), "aten._foreach_add_", OVERFLOW, large),
    with_optimizer("SGD, an infinite step", SINGLE, other(optim.SGD, lr=math.inf), "aten._foreach_add_", INVALID),
    with_optimizer("gradient by its norm, 0", SINGLE, adam(), "aten.div_", INVALID, by_norm, "clip"),
    with_optimizer(
        "gradient by its norm, underflow", SINGLE, adam(), "aten.div_", UNDERFLOW,
        lambda g, net: g.mul_(net.tiny()).div_((g * g).sum().sqrt()), "clip",
    ),
    with_optimizer("gradient unscaled by 1 / 0", SINGLE, adam(), "aten.mul_", INVALID, lambda g, net: g.mul_(math.inf), "clip"),
    with_optimizer("gradient too large", HALF, adam(), "aten.mul_", OVERFLOW, lambda g, net: g.mul_(net.huge()), "clip"),
    with_optimizer("repaired", SINGLE, adam(), None, None, repaired),
    with_optimizer("repaired, then zero by zero", SINGLE, adam(eps=0.0), FOREACH, INVALID, repaired),
    with_optimizer("healthy", SINGLE, adam(), None, None),
    with_optimizer("healthy, gradients 0", SINGLE, adam(), None, None, zero),
]  # fmt: skip

PATHOLOGIES = [
    *(
        pathology
        for name, runs, (op, cause, module, phase, microbatch) in FIRST
        for pathology in each_dtype(
            (HALF, SINGLE), (f"order: {name}", in_turn(*runs), op, cause),
            module=module, phase=phase, microbatch=microbatch, microbatches=len(runs),
        )
    ),
    *UPDATES,
    *each_dtype(
        (HALF, SINGLE),
        ("order: forces, then an output", lambda net, x: overflow(net, net.b(forces, x)), "aten.mul", OVERFLOW),
        module="a",
    ),
    Pathology("order: forces of an infinite slope", SINGLE, lambda net, x: net.b(spoilt_forces, x), "aten.div", INVALID),
]  # fmt: skip
