"""The causal resolvent mixer: per channel the last row of the inverse of a growing tridiagonal matrix.

With A_i the symmetric tridiagonal matrix of diagonal h_1 - i eta, ..., h_i - i eta and off-diagonal t_2, ..., t_i, the output
y_i is the last element of A_i^-1 (u_1, ..., u_i). By elimination,

    g_i = 1 / (h_i - i eta - t_i^2 g_{i-1})        y_i = g_i (u_i - t_i y_{i-1})

from a carried state (g_0, y_0), both 0 at the start of a text. Token i reads nothing after it. eta > 0 keeps Im g >= 0 and
with it |g_i| <= 1 / eta and |y_i| <= |u| / eta: no length overflows. Rounding grows as 1 / eta.

Adjoint, with lam and mu the gradients of y and g, from the last token to the first:

    lam_i = grad y_i - conj(t_{i+1} g_{i+1}) lam_{i+1}
    mu_i  = lam_i conj(u_i - t_i y_{i-1}) + conj(t_{i+1} g_{i+1})^2 mu_{i+1}
    du = Re(lam conj g)      dh = -Re(mu conj g^2)      deta = sum Im(mu conj g^2)
    dt_i = 2 t_i Re(mu_i conj(g_i^2 g_{i-1})) - Re(lam_i conj(g_i y_{i-1}))
    dg_0 = conj(t_1 g_1)^2 mu_1      dy_0 = -conj(t_1 g_1) lam_1

How a sequence is cut. g_i = D_{i-1} / D_i and y_i = E_i / D_i, where D_i = (h_i - i eta) D_{i-1} - t_i^2 D_{i-2} and
E_i = u_i D_{i-1} - t_i E_{i-1} are linear. So the map of a chunk comes from two starts, rescaled by powers of two; the
states at the chunks' starts follow one by one, and inside a chunk the definition itself is evaluated. The backward pass
evaluates it again, from the states at the chunks' starts, which are all that is kept. Everything is computed in fp32.

Memory traffic: forward u, h, t read twice (once where a sequence is one segment), the outputs written once; backward
u, h, t and the outputs' gradient read twice, three gradients written once. FLOPs a token: 19 C forward, 38 C backward.
"""

import torch

from kernels.dispatch import resolve_impl
from kernels.resolvent_mix import reference
from kernels.scan_blocks import check_scan, chunks_of, register_scan, scan_dtype, segments_of

_OP = "resolvent_mix"
_library = torch.library.Library("dtype_dynamics_resolvent_mix", "DEF")
State = tuple[torch.Tensor, torch.Tensor]


def flops(batch: int, tokens: int, channels: int) -> int:
    """Of the forward pass; the backward pass counts twice that."""
    return 19 * batch * tokens * channels


def bytes_moved(batch: int, tokens: int, channels: int, element_bytes: int, backward: bool = False) -> int:
    """Device-memory bytes of one pass over sequences that are cut into segments."""
    passes = 1 if segments_of(tokens, 4 * batch * channels)[0] == 1 else 2
    return batch * tokens * channels * element_bytes * (passes * 5 + 3 if backward else passes * 3 + 2)


def resolvent_mix(
    u: torch.Tensor, h: torch.Tensor, t: torch.Tensor, eta: torch.Tensor, state: State | None = None, *, impl: str = "auto"
) -> tuple[torch.Tensor, State]:
    """(outputs, state): the outputs (batch, tokens, 2 channels), real parts before imaginary ones, in u's dtype.

    u, h, t  (batch, tokens, channels): input, diagonal and off-diagonal; fp32, bf16, fp16 or (impl "torch") float64, mixed
    eta      (channels,), positive
    state    (g, y), (batch, 2, channels) each, real before imaginary, fp32 (float64 where an argument is): what the
             preceding tokens left. None: there are none

    Gradients flow to every argument, the state's two tensors included; there is no second derivative.
    TypeError for other dtypes, ValueError for other shapes, empty tensors and tensors on several devices.
    """
    along = ("batch", "tokens", "channels")
    shapes: dict[str, tuple[torch.Tensor, tuple[str, ...]]] = {"u": (u, along), "h": (h, along), "t": (t, along)}
    shapes["eta"] = eta, ("channels",)
    if state is None:
        sizes = check_scan(_OP, impl, shapes, ())
        zero = u.new_zeros(sizes["batch"], 2, sizes["channels"], dtype=scan_dtype(u, h, t, eta))
        state = zero, zero
    else:
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"{_OP}: state must be the pair (g, y), got {type(state).__name__}")
        shapes |= {"state g": (state[0], ("batch", "2", "channels")), "state y": (state[1], ("batch", "2", "channels"))}
        check_scan(_OP, impl, shapes, ("state g", "state y"))
    out, g, y, _ = _scan(u, h, t, eta, *state, resolve_impl(_OP, impl, u.device))
    return out, (g, y)


def _run(u, h, t, eta, g, y, impl):
    if impl == "torch":
        return reference.forward(u, h, t, eta, g, y)
    from kernels.resolvent_mix import triton_kernel

    return triton_kernel.forward(u, h, t, eta, g, y)


def _fake(u, h, t, eta, g, y, impl):
    batch, tokens, channels = u.shape
    starts = u.new_empty(chunks_of(tokens), 4, batch, channels, dtype=g.dtype)
    return u.new_empty(batch, tokens, 2 * channels), torch.empty_like(g), torch.empty_like(y), starts


def _run_backward(u, h, t, eta, g, y, starts, grad_out, grad_g, grad_y, impl):
    if impl == "torch":
        return reference.backward(u, h, t, eta, g, y, starts, grad_out, grad_g, grad_y)
    from kernels.resolvent_mix import triton_kernel

    return triton_kernel.backward(u, h, t, eta, g, y, starts, grad_out, grad_g, grad_y)


def _fake_backward(u, h, t, eta, g, y, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, h, t, eta, g, y))


_INPUTS = "Tensor u, Tensor h, Tensor t, Tensor eta, Tensor g, Tensor y"
_scan = register_scan(
    _library,
    (
        f"({_INPUTS}, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
        f"({_INPUTS}, Tensor starts, Tensor grad_out, Tensor grad_g, Tensor grad_y, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (_run, _fake),
    (_run_backward, _fake_backward),
    (lambda u, *_, **__: flops(*u), lambda u, *_, **__: 2 * flops(*u)),
)
