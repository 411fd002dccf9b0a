"""Infinities that somebody meant, beside a real fault, alone in health, and as the only cause."""

import torch

from tests.instrument.pathologies.planted import BRAIN, HALF, SINGLE, Pathology, each_dtype

INF = torch.inf


def future(net):
    """Booleans (2, 4): what a causal mask hides."""
    return torch.ones(2, 4).tril() == 0


CONSTANTS = {
    "log(mask)": lambda net: (~future(net)).to(net.dtype).log(),
    "log of a buffer": lambda net: net.a.tril[:2].log(),
    "log of integers": lambda net: torch.arange(4).clamp(max=1).to(net.dtype).expand(2, 4).log(),
    "masked_fill": lambda net: torch.zeros(2, 4, dtype=net.dtype).masked_fill(future(net), -INF),
    "where": lambda net: torch.where(future(net), -INF, 0.0).to(net.dtype),
    "triu of -inf": lambda net: torch.full((2, 4), -INF, dtype=net.dtype).triu(1),
    "handed in": lambda net: net.plain[-INF],
    "twice": lambda net: torch.zeros(2, 4, dtype=net.dtype).masked_fill(future(net), -INF) + net.a.tril[:2].log(),
    "of opposite sign": lambda net: -torch.zeros(2, 4, dtype=net.dtype).masked_fill(future(net), INF),
    "in place": lambda net: torch.zeros(2, 4, dtype=net.dtype).masked_fill_(future(net), -INF).mul_(2),
}
"""Masks: (2, 4), zero and minus infinity."""
LAST = {name: mask for name, mask in CONSTANTS.items() if name not in ("log of integers", "of opposite sign")}
"""Those that hide the last column, by -inf from the first."""
NARROW_CONSTANTS = {
    "(1 - mask) * -1e9": lambda net: (1 - (~future(net)).to(net.dtype)) * -1e9,
    "a mask handed in": lambda net: (1.0 - net.a.tril[:2]) * -1e9,
    "the minimum of fp32": lambda net: (future(net).float() * torch.finfo(torch.float32).min).to(net.dtype),
}
"""Masks that are infinite in fp16 alone."""
LIMITS = {
    "full(inf)": lambda net: torch.full((2, 4), INF, dtype=net.dtype),
    "a buffer": lambda net: net.a.limit,
    "an attribute": lambda net: net.plain[INF],
    "a closure's": lambda net: LIMIT.to(net.dtype),
    "1 / mask": lambda net: 1 / (future(net).to(net.dtype) * 0),
    "torch.tensor(inf)": lambda net: torch.tensor(INF, dtype=net.dtype),
    "masked_fill": lambda net: torch.zeros(2, 4, dtype=net.dtype).masked_fill(future(net) | True, INF),
}
"""Bounds that nothing has reached yet."""
LIMIT = torch.tensor(INF)


def softmaxed(constant):
    """In health: the mask is a softmax's."""
    return lambda net, x: net.c(lambda x, m: torch.softmax(x + m, -1), x, net.a(lambda: constant(net)))


def beside(constant):
    """The scores overflow before the mask is added."""
    return lambda net, x: net.c(
        lambda s, m: torch.softmax(s + m, -1), net.b(lambda x: x * net.huge() * 4, x), net.a(lambda: constant(net))
    )


def below_zero(constant):
    """The scores overflow to the mask's own value."""
    return lambda net, x: net.c(
        lambda s, m: torch.softmax(s + m, -1),
        net.b(lambda x: x * -net.huge() * 4, x),
        net.a(lambda: constant(net)),
    )


def after_softmax(constant):
    """What the masked softmax gives overflows."""
    return lambda net, x: net.b(lambda p: p * net.huge() * net.huge(), softmaxed(constant)(net, x))


def sum_of_three(constant):
    """The op reads the mask and overflows in an element that is not masked."""
    return lambda net, x: net.b(lambda x, m: torch.addcmul(m, x * net.huge(), x * 4).amax(-1), x, net.a(lambda: constant(net)))


def backward(constant):
    """The gradient of the masked scores overflows: what is multiplied is a difference of equals."""

    def run(net, x):
        scores = net.b(lambda x, m: (x * 4 + m).clamp(min=0), x, net.a(lambda: constant(net)))
        return net.c(lambda s: (s - s.detach()) * net.huge(), scores)

    return run


def running_minimum(constant):
    return lambda net, x: net.c(
        lambda d, m: torch.minimum(m, d) + d, net.b(lambda x: x * net.huge() * 4, x), net.a(lambda: constant(net))
    )


def clamped(constant):
    return lambda net, x: net.c(
        lambda d, m: torch.clamp(d, max=m) * 2, net.b(lambda x: x * net.huge() * 4, x), net.a(lambda: constant(net))
    )


def healthy_minimum(constant):
    return lambda net, x: net.c(lambda x, m: torch.minimum(m.expand(2, 4), x), x, net.a(lambda: constant(net)))


def after_a_minimum(constant):
    return lambda net, x: net.b(lambda x: x * net.huge() * 4, healthy_minimum(constant)(net, x))


def alone(constant):
    """It reaches the loss, and nothing else is wrong."""
    return lambda net, x: net.c(lambda x, m: x + m, x, net.a(lambda: constant(net)))


def every_row(constant):
    """A row that is masked altogether."""
    return lambda net, x: net.b(lambda x, m: torch.softmax(x + m[:, -1:], -1), x, net.a(lambda: constant(net)))


def masked_rows(wide):
    """A logarithm of sums whose second row is masked altogether, and -inf in health."""

    def run(net, x):
        hidden = torch.zeros(2, 4, dtype=net.dtype).masked_fill(torch.tensor([[False], [True]]), -INF)
        total = net.a(lambda x: (x + hidden).logsumexp(-1, keepdim=True), x) if wide else net.a(by_hand, x + hidden)
        return net.c(lambda x, t: x + torch.where(t.isinf(), 0, t), x, total)

    return run


def by_hand(scores):
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top.isinf(), 0, top)
    return (scores - top).exp().sum(-1, keepdim=True).log() + top


def rows(constants, use, *expected):
    return [(f"{use.__name__.replace('_', ' ')}: {name}", use(constant), *expected) for name, constant in constants.items()]


OVERFLOW, INVALID = "overflow", "invalid"
ALL = (HALF, BRAIN, SINGLE)
PATHOLOGIES = [
    *each_dtype(ALL, *rows(CONSTANTS, softmaxed, None, None), in_float64=True),
    *each_dtype((HALF, SINGLE), *rows(CONSTANTS, beside, "aten.mul", OVERFLOW), in_float64=True),
    *each_dtype((HALF, BRAIN), *rows(CONSTANTS, below_zero, "aten.mul", OVERFLOW)),
    *each_dtype((HALF, SINGLE), *rows(CONSTANTS, after_softmax, "aten.mul", OVERFLOW)),
    *each_dtype((HALF, SINGLE), *rows(CONSTANTS, sum_of_three, "aten.addcmul", OVERFLOW)),
    *each_dtype((HALF, BRAIN), *rows(CONSTANTS, backward, "aten.mul", OVERFLOW), phase="backward"),
    *each_dtype((HALF, SINGLE), *rows(LAST, every_row, "aten._softmax", INVALID), in_float64=False),
    *each_dtype((HALF,), *rows(NARROW_CONSTANTS, softmaxed, None, None), in_float64=True),
    *each_dtype((HALF,), *rows(NARROW_CONSTANTS, beside, "aten.mul", OVERFLOW), in_float64=True),
    *each_dtype((HALF,), *rows(NARROW_CONSTANTS, below_zero, "aten.mul", OVERFLOW)),
    *each_dtype((HALF,), *rows(NARROW_CONSTANTS, after_softmax, "aten.mul", OVERFLOW)),
    *each_dtype((HALF,), *rows(NARROW_CONSTANTS, sum_of_three, "aten.addcmul", OVERFLOW)),
    *each_dtype((HALF, SINGLE), *rows(LIMITS, healthy_minimum, None, None), in_float64=True),
    *each_dtype((HALF, SINGLE), *rows(LIMITS, running_minimum, "aten.mul", OVERFLOW), in_float64=True),
    *each_dtype((HALF, SINGLE), *rows(LIMITS, clamped, "aten.mul", OVERFLOW), in_float64=True),
    *each_dtype((HALF, SINGLE), *rows(LIMITS, after_a_minimum, "aten.mul", OVERFLOW), in_float64=True),
    Pathology("a masked row", HALF, lambda net, x: masked_rows(True)(net, x.detach()) * x, None, None, in_float64=True),
    Pathology(
        "a masked row by hand", HALF, lambda net, x: masked_rows(False)(net, x.detach()) * x, None, None, in_float64=True
    ),
    *each_dtype(
        (HALF, SINGLE),
        (
            "beside a masked row",
            lambda net, x: masked_rows(True)(net, net.b(lambda x: x * net.huge() * 4, x)),
            "aten.mul",
            OVERFLOW,
        ),
        (
            "after a masked row",
            lambda net, x: net.b(lambda x: x * net.huge() * 4, masked_rows(True)(net, x)),
            "aten.mul",
            OVERFLOW,
        ),
        (
            "after one by hand",
            lambda net, x: net.b(lambda x: x * net.huge() * 4, masked_rows(False)(net, x)),
            "aten.mul",
            OVERFLOW,
        ),
    ),
    Pathology("every row: of opposite sign", HALF, every_row(CONSTANTS["of opposite sign"]), "aten.masked_fill", INVALID, "a"),
    Pathology("alone: log(mask)", HALF, alone(CONSTANTS["log(mask)"]), "aten.log", INVALID, "a"),
    Pathology("alone: masked_fill", HALF, alone(CONSTANTS["masked_fill"]), "aten.masked_fill", INVALID, "a"),
    Pathology("alone: (1 - mask) * -1e9", HALF, alone(NARROW_CONSTANTS["(1 - mask) * -1e9"]), "aten.mul", OVERFLOW, "a"),
    Pathology("alone: full(inf)", SINGLE, alone(LIMITS["full(inf)"]), "aten.full", INVALID, "a"),
    Pathology("alone: a buffer", SINGLE, alone(LIMITS["a buffer"]), "aten.add", "from_input", "c"),
]
