"""Mamba's selective scan: a diagonal linear recurrence whose decay, input and output weights depend on the token.

Of a channel, with its step delta_i > 0, and a state of some numbers s (16 in Mamba), A < 0:

    h_i[s] = exp(delta_i A[s]) h_{i-1}[s] + delta_i u_i B_i[s]        y_i = sum_s C_i[s] h_i[s] + D u_i

from a carried state h_0. B and C are shared by all channels of a token. Token i reads nothing after it; a decay is at most 1.

Adjoint, with lam the gradient of h, from the last token to the first, w = sum_s lam B and q = lam exp(delta A) h_{i-1}:

    lam_i = C_i grad y_i + exp(delta_{i+1} A) lam_{i+1}
    du = delta w + D grad y      d delta = sum_s q A + u w      dA = sum_i delta q      dD = sum_i u grad y
    dB = sum over channels of lam delta u      dC = sum over channels of h grad y      dh_0 = exp(delta_1 A) lam_1

How a sequence is cut. What a chunk makes of a state is exp(A sum delta) times that state, plus what it makes of zeros. So
the states at the chunks' starts follow one by one, and inside a chunk the definition is evaluated. Only these states are
kept; the backward pass evaluates the chunk again. Everything is computed in fp32: in bf16 a decay near 1 rounds to 1.

Memory traffic: forward u, delta, B (C once) read twice (once where a sequence is one segment), the outputs written once;
backward u, delta, B, C and the outputs' gradient read twice, the gradients written once.
FLOPs a token, with I channels of N numbers: 7 I N + 3 I forward (delta A, its exponential, delta u B, decay and sum, C h and
sum; delta u, D u and sum), twice that backward.
"""

import torch

from kernels.dispatch import resolve_impl
from kernels.scan_blocks import check_scan, chunks_of, register_scan, scan_dtype, segments_of
from kernels.selective_scan import reference

_OP = "selective_scan"
_library = torch.library.Library("dtype_dynamics_selective_scan", "DEF")


def flops(batch: int, tokens: int, channels: int, states: int) -> int:
    """Of the forward pass; the backward pass counts twice that."""
    return batch * tokens * channels * (7 * states + 3)


def bytes_moved(batch: int, tokens: int, channels: int, states: int, element_bytes: int, backward: bool = False) -> int:
    """Device-memory bytes of one pass over sequences that are cut into segments; A, D and states are left out."""
    passes = 1 if segments_of(tokens, batch * channels * states)[0] == 1 else 2
    if backward:
        numbers = passes * (3 * channels + 2 * states) + 2 * channels + 2 * states
    else:
        numbers = passes * (2 * channels + states) + states + channels
    return batch * tokens * numbers * element_bytes


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, state): the outputs (batch, tokens, channels), in u's dtype; the gate is the caller's.

    u, delta  (batch, tokens, channels): input, and its step after softplus
    A         (channels, states), negative: `-exp(A_log)` of Mamba
    B, C      (batch, tokens, states)
    D         (channels,)
    state     (batch, channels, states), fp32 (float64 where an argument is): what the preceding tokens left. None: zeros

    fp32, bf16, fp16 or (impl "torch") float64, mixed. Gradients flow to every argument; there is no second derivative.
    TypeError for other dtypes, ValueError for other shapes, empty tensors and tensors on several devices.
    """
    along, of_token = ("batch", "tokens", "channels"), ("batch", "tokens", "states")
    shapes: dict[str, tuple[torch.Tensor, tuple[str, ...]]] = {"u": (u, along), "delta": (delta, along)}
    shapes |= {"A": (A, ("channels", "states")), "B": (B, of_token), "C": (C, of_token), "D": (D, ("channels",))}
    if state is None:
        sizes = check_scan(_OP, impl, shapes, ())
        dtype = scan_dtype(u, delta, A, B, C, D)
        state = u.new_zeros(sizes["batch"], sizes["channels"], sizes["states"], dtype=dtype)
    else:
        check_scan(_OP, impl, shapes | {"state": (state, ("batch", "channels", "states"))}, ("state",))
    out, state, _ = _scan(u, delta, A, B, C, D, state, resolve_impl(_OP, impl, u.device))
    return out, state


def _run(*arguments):
    *tensors, impl = arguments
    if impl == "torch":
        return reference.forward(*tensors)
    from kernels.selective_scan import triton_kernel

    return triton_kernel.forward(*tensors)


def _fake(u, delta, A, B, C, D, state, impl):
    starts = torch.empty(chunks_of(u.shape[1]), *state.shape, dtype=state.dtype, device=u.device)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(state), starts


def _run_backward(*arguments):
    *tensors, impl = arguments
    if impl == "torch":
        return reference.backward(*tensors)
    from kernels.selective_scan import triton_kernel

    return triton_kernel.backward(*tensors)


def _fake_backward(u, delta, A, B, C, D, state, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, A, B, C, D, state))


def _flops_of(u, delta, A, *_, **__) -> int:
    batch, tokens, channels = u
    return flops(batch, tokens, channels, A[1])


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor state"
_scan = register_scan(
    _library,
    (
        f"({_INPUTS}, str impl) -> (Tensor, Tensor, Tensor)",
        f"({_INPUTS}, Tensor starts, Tensor grad_out, Tensor grad_state, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (_run, _fake),
    (_run_backward, _fake_backward),
    (_flops_of, lambda *shapes, **__: 2 * _flops_of(*shapes)),
)
