"""Divisions by what underflowed, true singularities, and overflows, forward and backward, each in several dtypes."""

import torch
import torch.nn.functional as F

from tests.instrument.pathologies.planted import BRAIN, DOUBLE, HALF, SINGLE, Pathology, each_dtype

ALL = (HALF, BRAIN, SINGLE)
UNDERFLOW, OVERFLOW, INVALID = "underflow_then_divide", "overflow", "invalid"
COLD = {HALF: 20.0, BRAIN: 110.0, SINGLE: 110.0}
"""Its negative exponential is zero in the dtype, and not in float64."""
SUBNORMAL = {HALF: 1e-6, BRAIN: 1e-39, SINGLE: 1e-39}
"""Its reciprocal is infinite in the dtype, and not in float64."""


def in_b(function):
    """Run ``function(net, x)`` in place ``b``."""
    return lambda net, x: net.b(lambda x: function(net, x), x)


def tiny(net, x):
    return x * net.tiny()


def uneven(net, x):
    return x * net.new(1.0, 2.0, 3.0, 4.0) * net.tiny()


def squared(net, x):
    return tiny(net, x) * tiny(net, x)


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred * centred).mean(-1, keepdim=True).sqrt()


def softmax(net, x):
    weights = torch.exp(-COLD[net.narrow] * x)
    return weights / weights.sum(-1, keepdim=True)


UNDERFLOWS = (
    ("by a square", in_b(lambda net, x: x / squared(net, x)), "aten.div"),
    ("LayerNorm by hand", in_b(lambda net, x: layer_norm(uneven(net, x))), "aten.div"),
    ("RMSNorm by hand", in_b(lambda net, x: tiny(net, x) * squared(net, x).mean(-1, keepdim=True).rsqrt()), "aten.rsqrt"),
    ("x / |x|", in_b(lambda net, x: tiny(net, x) / squared(net, x).sum(-1, keepdim=True).sqrt()), "aten.div"),
    ("pow(-0.5)", in_b(lambda net, x: squared(net, x).mean(-1, keepdim=True).pow(-0.5)), "aten.pow"),
    ("pow(-1)", in_b(lambda net, x: squared(net, x) ** -1), "aten.pow"),
    ("pow(-2) of a tensor", in_b(lambda net, x: torch.pow(squared(net, x), x * -2)), "aten.pow"),
    ("reciprocal", in_b(lambda net, x: squared(net, x).reciprocal()), "aten.reciprocal"),
    ("rsqrt in place", in_b(lambda net, x: squared(net, x).rsqrt_()), "aten.rsqrt_"),
    ("logarithm", in_b(lambda net, x: squared(net, x).log()), "aten.log"),
    ("log2", in_b(lambda net, x: squared(net, x).log2()), "aten.log2"),
    ("xlogy", in_b(lambda net, x: torch.xlogy(x, squared(net, x))), "aten.xlogy"),
    ("an epsilon", in_b(lambda net, x: x / (x * 0 + net.tiny() ** 2)), "aten.div"),
    ("softmax by hand", in_b(softmax), "aten.div"),
    ("a cosine by hand", in_b(lambda net, x: squared(net, x).sum() / squared(net, x).sum(-1)), "aten.div"),
    ("addcdiv", in_b(lambda net, x: torch.addcdiv(x, x, squared(net, x))), "aten.addcdiv"),
    ("over lists", in_b(lambda net, x: torch._foreach_div([x, x], [x, squared(net, x)])[1]), "aten._foreach_div"),
    ("in place", in_b(lambda net, x: (x * 1).div_(squared(net, x))), "aten.div_"),
    ("by a product of matrices", in_b(lambda net, x: x[:, :2] / (tiny(net, x) @ tiny(net, x).T)), "aten.div"),
    ("by a cast", in_b(lambda net, x: x / (x.double() * net.tiny() ** 2).to(net.dtype)), "aten.div"),
    ("through views", in_b(lambda net, x: x / torch.cat([squared(net, x), x])[:2].T.contiguous().T), "aten.div"),
    ("of half of the elements", in_b(lambda net, x: x / torch.cat([squared(net, x[:1]), x[1:]])), "aten.div"),
    ("through a part written", in_b(lambda net, x: x / torch.zeros_like(x).copy_(squared(net, x))), "aten.div"),
    ("in another module", lambda net, x: net.b(torch.div, x, net.a(lambda x: squared(net, x), x)), "aten.div"),
    ("sum of rounded terms", in_b(lambda net, x: x / squared(net, x).cumsum(-1)), "aten.div"),
    ("twice removed", in_b(lambda net, x: x / ((squared(net, x) * 8).abs() * 2).sqrt().unsqueeze(0)), "aten.div"),
)
UNDERFLOWS_BACKWARD = (
    ("square root", in_b(lambda net, x: squared(net, x).sum(-1).sqrt()), "aten.div"),
    ("fractional power", in_b(lambda net, x: squared(net, x).pow(0.75)), "aten.pow"),
)
ZEROS = (
    ("0 / 0", in_b(lambda net, x: (x * 0) / (x * 0)), "aten.div"),
    ("1 / 0", in_b(lambda net, x: x / (x * 0)), "aten.div"),
    ("1 / 0, an integer", in_b(lambda net, x: x / 0), "aten.div"),
    ("1 / a count of 0", in_b(lambda net, x: x / (x > 9).sum(-1, keepdim=True)), "aten.div"),
    ("difference of equals", in_b(lambda net, x: x / (x - x)), "aten.div"),
    ("an underflow beside it", in_b(lambda net, x: x / (x - x) + squared(net, x)), "aten.div"),
    ("an underflow in it", in_b(lambda net, x: (x + squared(net, x)) / (x - x)), "aten.div"),
    ("a dead ReLU", in_b(lambda net, x: x / F.relu(-x)), "aten.div"),
    ("LayerNorm of equals", in_b(lambda net, x: layer_norm(x)), "aten.div"),
    ("rows of zeros by their sum", in_b(lambda net, x: (x * 0) / (x * 0).sum(-1, keepdim=True)), "aten.div"),
    ("rsqrt of zero", in_b(lambda net, x: (x * 0).rsqrt()), "aten.rsqrt"),
    ("0 ** -0.5", in_b(lambda net, x: (x * 0) ** -0.5), "aten.pow"),
    ("reciprocal of zero", in_b(lambda net, x: (x * 0).reciprocal()), "aten.reciprocal"),
    ("logarithm of zero", in_b(lambda net, x: (x * 0).log()), "aten.log"),
    ("logarithm below zero", in_b(lambda net, x: (-x).log()), "aten.log"),
    ("square root below zero", in_b(lambda net, x: (-x).sqrt()), "aten.sqrt"),
    ("log1p(-1)", in_b(lambda net, x: (-x).log1p()), "aten.log1p"),
    ("atanh(1)", in_b(lambda net, x: x.atanh()), "aten.atanh"),
    ("acos(2)", in_b(lambda net, x: (x * 2).acos()), "aten.acos"),
    ("logit(1)", in_b(lambda net, x: x.logit()), "aten.logit"),
    ("erfinv(1)", in_b(lambda net, x: x.erfinv()), "aten.erfinv"),
    ("mean of nothing", in_b(lambda net, x: x[:0].mean()), "aten.mean"),
    ("remainder by zero", in_b(lambda net, x: torch.remainder(x, x * 0)), "aten.remainder"),
    ("all targets ignored", in_b(lambda net, x: F.cross_entropy(x, torch.full((2,), -100))), "aten.nll_loss_forward"),
    ("an overflow that was repaired", in_b(lambda net, x: (x * net.huge() * 4).clamp(max=1).log() / (x * 0)), "aten.div"),
    ("infinity written down", in_b(lambda net, x: x * torch.inf), "aten.mul"),
    ("NaN written down", in_b(lambda net, x: x + torch.full_like(x, torch.nan)), "aten.full_like"),
    ("NaN filled in", in_b(lambda net, x: x.masked_fill(x > 0, torch.nan)), "aten.masked_fill"),
)
ZEROS_BACKWARD = (
    ("square root at zero", in_b(lambda net, x: (x - x.detach()).sqrt()), "aten.div"),
    ("power at zero", in_b(lambda net, x: (x - x.detach()).pow(0.5)), "aten.pow"),
    ("a branch not taken", in_b(lambda net, x: torch.where(x > 0, x, (x - x.detach()).sqrt())), "aten.div"),
)
OVERFLOWS = (
    ("sum of two", in_b(lambda net, x: x * net.huge() + x * net.huge()), "aten.add"),
    ("product", in_b(lambda net, x: (x * net.huge()) * 4), "aten.mul"),
    ("product in place", in_b(lambda net, x: (x * net.huge()).mul_(4)), "aten.mul_"),
    ("square", in_b(lambda net, x: (x * net.huge()).square()), "aten.pow"),
    ("matrices", in_b(lambda net, x: (x * net.huge()) @ net.b.tril), "aten.mm"),
    ("linear layer", in_b(lambda net, x: F.linear(x * net.huge(), net.b.tril, net.b.weight)), "aten.addmm"),
    ("batches of matrices", in_b(lambda net, x: torch.bmm((x * net.huge())[None], net.b.tril[None])), "aten.bmm"),
    ("sum", in_b(lambda net, x: (x * net.huge()).sum(-1)), "aten.sum"),
    ("running sum", in_b(lambda net, x: (x * net.huge()).cumsum(-1)), "aten.cumsum"),
    ("product of a row", in_b(lambda net, x: (x * net.huge()).prod(-1)), "aten.prod"),
    ("cosh", in_b(lambda net, x: (x * 5 * COLD[net.narrow]).cosh()), "aten.cosh"),
    ("exponential", in_b(lambda net, x: (x * COLD[net.narrow]).exp()), "aten.exp"),
    ("variance", in_b(lambda net, x: (x * net.new(1, 2, 3, 4) * (net.huge() / 4)).var(-1)), "aten.var"),
    ("by a small number", in_b(lambda net, x: x / (x * SUBNORMAL[net.narrow])), "aten.div"),
    ("reciprocal of a small number", in_b(lambda net, x: (x * SUBNORMAL[net.narrow]).reciprocal()), "aten.reciprocal"),
    ("by a small scalar", in_b(lambda net, x: x / SUBNORMAL[net.narrow]), "aten.div"),
    ("an underflow beside it", in_b(lambda net, x: (squared(net, x) + x * net.huge()) * 4), "aten.mul"),
    ("zeros beside it", in_b(lambda net, x: (x * net.huge()) @ (net.b.tril * 4)), "aten.mm"),
    ("over lists", in_b(lambda net, x: torch._foreach_mul([x, x * net.huge()], 4.0)[1]), "aten._foreach_mul"),
    ("below zero", in_b(lambda net, x: (x * -net.huge()) * 4), "aten.mul"),
    (
        "of a part that is written",
        in_b(lambda net, x: torch.cat([x, x * net.huge()]).index_add_(0, torch.tensor([3]), x[:1] * net.huge())),
        "aten.index_add_",
    ),
)
BEYOND = (
    ("exp(1000)", in_b(lambda net, x: (x * 1000).exp()), "aten.exp"),
    ("expm1(1000)", in_b(lambda net, x: (x * 1000).expm1()), "aten.expm1"),
    ("exp2(2000)", in_b(lambda net, x: (x * 2000).exp2()), "aten.exp2"),
    ("sinh(1000)", in_b(lambda net, x: (x * 1000).sinh()), "aten.sinh"),
    ("a high power", in_b(lambda net, x: (x * 9).pow(400)), "aten.pow"),
)
"""Overflows that float64 has, too."""


def backward_overflow(net, x):
    """The forward pass is finite: what is multiplied is a difference of equals."""
    four = net.b(lambda x: x * 4, x)
    return net.c(lambda four: (four - 4) * net.huge(), four)


def paired(x):
    """The numbers of (2, 4) as (2, 2) complex ones."""
    return torch.view_as_complex(x.view(2, 2, 2))


def apart(z):
    return torch.view_as_real(z).view(2, 4)


def complex_square(net, x):
    z = paired(tiny(net, x))
    return z * z.conj()


COMPLEX_UNDERFLOWS = (
    ("a complex square", in_b(lambda net, x: apart(paired(x) / complex_square(net, x))), "aten.div"),
    ("the conjugate of one", in_b(lambda net, x: apart(paired(x) / complex_square(net, x).conj())), "aten.div"),
    ("its logarithm", in_b(lambda net, x: apart(complex_square(net, x).log())), "aten.log"),
)
SINGULAR = (
    ("a singular matrix", in_b(lambda net, x: torch.linalg.slogdet(x.T @ x)[1]), "aten._linalg_slogdet"),
    ("no alignment", in_b(lambda net, x: aligned(x)), "aten._ctc_loss"),
)
"""Infinite however their inputs move."""


def aligned(x):
    """Two steps for three labels."""
    lengths = torch.tensor([2]), torch.tensor([3])
    return F.ctc_loss(x.log_softmax(-1).unsqueeze(1), torch.tensor([[1, 1, 2]]), *lengths)


COMPLEX_ZEROS = (
    ("complex 1 / 0", in_b(lambda net, x: apart(paired(x) / paired(x * 0))), "aten.div"),
    ("logarithm of a complex zero", in_b(lambda net, x: apart(paired(x * 0).log())), "aten.log"),
)


def complex_root(net, x):
    return net.b(lambda x: apart(paired(x - x.detach()).sqrt()), x)


def rows(table, cause):
    return [(f"{cause}: {name}", run, op, cause) for name, run, op in table]


PATHOLOGIES = [
    *each_dtype(ALL, *rows(UNDERFLOWS, UNDERFLOW), in_float64=True),
    *each_dtype(ALL, *rows(UNDERFLOWS_BACKWARD, UNDERFLOW), phase="backward", in_float64=True),
    *each_dtype((HALF, SINGLE), *rows(ZEROS, INVALID), in_float64=False),
    *each_dtype((BRAIN, SINGLE), *rows(ZEROS_BACKWARD, INVALID), phase="backward", in_float64=False),
    *each_dtype(ALL, *rows(OVERFLOWS, OVERFLOW), in_float64=True),
    *each_dtype(ALL, *rows(BEYOND, OVERFLOW), in_float64=False),
    *each_dtype(ALL, ("overflow: gradient", backward_overflow, "aten.mul", OVERFLOW), phase="backward", in_float64=True),
    Pathology("overflow: float64 itself", DOUBLE, in_b(lambda net, x: x * 1e200 * 1e200), "aten.mul", OVERFLOW),
    Pathology(
        "overflow: a cast",
        HALF,
        in_b(lambda net, x: (x.float() * 1e6).to(net.dtype)),
        "aten._to_copy",
        OVERFLOW,
        in_float64=True,
    ),
    *each_dtype((SINGLE,), *rows(COMPLEX_UNDERFLOWS, UNDERFLOW), in_float64=True),
    *each_dtype((SINGLE,), *rows((*COMPLEX_ZEROS, *SINGULAR), INVALID), in_float64=False),
    Pathology("invalid: complex root at zero", SINGLE, complex_root, "aten.div", INVALID, phase="backward", in_float64=False),
    Pathology("overflow: complex", SINGLE, in_b(lambda net, x: torch.fft.fft(x * net.huge()).abs()), "aten._fft_r2c", OVERFLOW),
    Pathology(
        "underflow: inside of one op",
        SINGLE,
        in_b(lambda net, x: F.layer_norm(uneven(net, x), (4,), eps=0.0)),
        "aten.native_layer_norm",
        UNDERFLOW,
        in_float64=True,
    ),
    Pathology(
        "overflow: inside of one op",
        SINGLE,
        in_b(lambda net, x: F.layer_norm(uneven(net, x) * 1e30 * 1e30, (4,))),
        "aten.native_layer_norm",
        OVERFLOW,
    ),
]
