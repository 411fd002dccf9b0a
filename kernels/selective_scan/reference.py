"""The definition of `selective_scan`, token by token, and its chunked evaluation in plain torch.

Inside, states come before channels, so that the longer dimension is the contiguous one.
"""

import torch

from kernels.scan_blocks import CHUNK, blocks, chunks_of, put_back, scan_dtype, token_major

TOGETHER = 2**16  # numbers


def definition(u, delta, A, B, C, D, state) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, state) of `selective_scan`, token by token, in fp32 or float64. Autograd can differentiate it."""
    dtype = scan_dtype(u, delta, A, B, C, D)
    h, A, D = (x.to(dtype) for x in (state, A, D))
    outputs = []
    for u_i, delta_i, B_i, C_i in zip(*(x.to(dtype).unbind(1) for x in (u, delta, B, C)), strict=True):
        h = torch.exp(delta_i[..., None] * A) * h + (delta_i * u_i)[..., None] * B_i[:, None]
        outputs.append((h * C_i[:, None]).sum(-1) + D * u_i)
    return torch.stack(outputs, 1).to(u.dtype), h


def forward(u, delta, A, B, C, D, state) -> tuple[torch.Tensor, ...]:
    """(outputs, state, the states at the chunks' starts (chunks, batch, channels, states)), as the operator returns them."""
    batch, tokens, channels = u.shape
    dtype = scan_dtype(u, delta, A, B, C, D)
    out = torch.empty(batch, tokens, channels, dtype=u.dtype, device=u.device)
    starts = torch.empty(chunks_of(tokens), *state.shape, dtype=dtype, device=u.device)
    A, D, h = A.to(dtype).t().contiguous(), D.to(dtype), state.to(dtype).transpose(1, 2).contiguous()
    for block in blocks(tokens, batch * A.numel(), TOGETHER):
        ub, db, Bb, Cb = (token_major(x, block, dtype) for x in (u, delta, B, C))
        first, decays = h[None], None
        if block[1] > 1:
            own, decays = _chunk_states(ub, db, A, Bb)
            first = _along_chunks(own, _whole_decay(db, A), h)
        starts[block[0] // CHUNK :][: block[1]] = first.transpose(2, 3)
        made, h = torch.empty_like(ub), first.clone()
        product = torch.empty_like(h)
        for i in range(len(ub)):
            decay = _decay(db[i], A, product) if decays is None else decays[i]
            torch.mul(h, decay, out=h).addcmul_((db[i] * ub[i])[:, :, None], Bb[i, ..., None])
            torch.sum(torch.mul(h, Cb[i, ..., None], out=product), 2, out=made[i])
        put_back(out, block, made.addcmul_(ub, D))
        h = h[-1]
    return out, h.transpose(1, 2).clone(memory_format=torch.contiguous_format), starts


def _decay(delta: torch.Tensor, A: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(delta[:, :, None], A, out=out).exp_()


def _whole_decay(delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What is left of a state after each chunk, (chunks, batch, states, channels)."""
    return (delta.sum(0)[:, :, None] * A).exp_()


def _chunk_states(u, delta, A, B) -> tuple[torch.Tensor, torch.Tensor]:
    """What each chunk makes of a state of zeros, and every token's decays."""
    decays = torch.empty(*u.shape[:3], *A.shape, dtype=u.dtype, device=u.device)
    h = u.new_zeros(decays.shape[1:])
    for u_i, delta_i, B_i, decay in zip(u.unbind(), delta.unbind(), B.unbind(), decays.unbind(), strict=True):
        torch.mul(h, _decay(delta_i, A, decay), out=h).addcmul_((delta_i * u_i)[:, :, None], B_i[..., None])
    return h, decays


def _along_chunks(own: torch.Tensor, decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x as it enters each chunk, given what it is before the first: a chunk makes own + decay x of it."""
    kept = torch.empty_like(own)
    kept[0] = x
    for k in range(len(own) - 1):
        torch.addcmul(own[k], decay[k], kept[k], out=kept[k + 1])
    return kept


def backward(u, delta, A, B, C, D, state, starts, grad_out, grad_state) -> tuple[torch.Tensor, ...]:
    """The gradients of all inputs, given those of the outputs and of the state that is left."""
    batch, tokens, channels = u.shape
    dtype = starts.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C)]
    of_A, of_D = A, D
    A, D = A.to(dtype).t().contiguous(), D.to(dtype)
    sum_A, sum_D = A.new_zeros(A.shape, dtype=torch.float64), D.new_zeros(D.shape, dtype=torch.float64)
    carry = grad_state.to(dtype).transpose(1, 2)  # what enters a token from its right
    for block in reversed(list(blocks(tokens, batch * A.numel(), TOGETHER))):
        ub, db, Bb, Cb, gyb = (token_major(x, block, dtype) for x in (u, delta, B, C, grad_out))
        decays, hs = _states(ub, db, A, Bb, starts[block[0] // CHUNK :][: block[1]].transpose(2, 3))
        right = carry[None]
        if block[1] > 1:
            own = torch.zeros_like(hs[0])
            for i in range(len(ub) - 1, -1, -1):
                own.addcmul_(Cb[i, ..., None], gyb[i, :, :, None]).mul_(decays[i])
            right = _along_chunks(own.flip(0), _whole_decay(db, A).flip(0), carry).flip(0)
        carry, lam, product = right.clone(memory_format=torch.contiguous_format), *(torch.empty_like(hs[0]) for _ in range(2))
        of_x, of_exponent, grad_B, grad_C = (torch.empty_like(x) for x in (ub, db, Bb, Cb))
        block_A = torch.zeros_like(lam)
        for i in range(len(ub) - 1, -1, -1):
            torch.addcmul(carry, Cb[i, ..., None], gyb[i, :, :, None], out=lam)
            torch.sum(torch.mul(hs[i + 1], gyb[i, :, :, None], out=product), 3, out=grad_C[i])
            torch.sum(torch.mul(lam, (db[i] * ub[i])[:, :, None], out=product), 3, out=grad_B[i])
            torch.sum(torch.mul(lam, Bb[i, ..., None], out=product), 2, out=of_x[i])
            torch.mul(lam, decays[i], out=carry)
            torch.mul(carry, hs[i], out=lam)  # the gradient of delta A
            block_A.addcmul_(lam, db[i, :, :, None])
            torch.sum(lam.mul_(A), 2, out=of_exponent[i])
        carry = carry[0]
        made = torch.addcmul(of_x * db, gyb, D), torch.addcmul(of_exponent, of_x, ub), grad_B, grad_C
        for out, x in zip(grads, made, strict=True):
            put_back(out, block, x)
        sum_A += block_A.sum((0, 1))
        sum_D += (gyb * ub).sum((0, 1, 2))
    grad_u, grad_delta, grad_B, grad_C = grads
    grad_A = sum_A.t().to(of_A.dtype, memory_format=torch.contiguous_format)
    grad_h = carry.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, sum_D.to(of_D.dtype), grad_h


def _states(u, delta, A, B, first) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's decays, and the states before the first token and after each."""
    decays = torch.empty(*u.shape[:3], *A.shape, dtype=u.dtype, device=u.device)
    hs = torch.empty(len(u) + 1, *decays.shape[1:], dtype=u.dtype, device=u.device)
    hs[0] = first
    for i in range(len(u)):
        torch.mul(hs[i], _decay(delta[i], A, decays[i]), out=hs[i + 1])
        hs[i + 1].addcmul_((delta[i] * u[i])[:, :, None], B[i, ..., None])
    return decays, hs
