"""The definition of `selective_scan`, token by token, and its chunked evaluation in plain torch.

Inside, states come before channels, so that the longer dimension is the contiguous one. What needs no neighbour (decays,
which cost the most, inputs, outputs) is computed for a block at once; what is left to a token is one fused product and sum.
"""

import math

import torch

from kernels.scan_blocks import CHUNK, blocks, chunks_of, put_back, scan_dtype, token_major

TOGETHER = 2**14  # numbers
LOG2_E = math.log2(math.e)
"""Powers of 2 and not of e: torch's `exp2` is seven times as fast as its `exp` on a CPU."""


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
    tokens = u.shape[1]
    dtype = scan_dtype(u, delta, A, B, C, D)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    starts = torch.empty(chunks_of(tokens), *state.shape, dtype=dtype, device=u.device)
    A, D, h = A.to(dtype).t().contiguous(), D.to(dtype), state.to(dtype).transpose(1, 2).contiguous()
    room = _room(tokens, h, 2)
    for block in blocks(tokens, h.numel(), TOGETHER):
        ub, db, Bb, Cb = (token_major(x, block, dtype) for x in (u, delta, B, C))
        decays, hs = (x[: block[2] + i, : block[1]] for i, x in enumerate(room))
        _decays_and_inputs(ub, db, A, Bb, decays, hs)
        first = h[None]
        if block[1] > 1:
            own = torch.zeros_like(hs[0])
            for decay, added in zip(decays.unbind(), hs[1:].unbind(), strict=True):
                torch.addcmul(added, decay, own, out=own)
            first = _along_chunks(own, _whole_decay(db, A), h)
        starts[block[0] // CHUNK :][: block[1]] = first.transpose(2, 3)
        _walk(decays, hs, first)
        h = hs[-1, -1].clone()
        put_back(out, block, hs[1:].mul_(Cb[..., None]).sum(3).addcmul_(ub, D))
    return out, h.transpose(1, 2).clone(memory_format=torch.contiguous_format), starts


def _room(tokens: int, state: torch.Tensor, many: int) -> list[torch.Tensor]:
    """Tensors for the decays (and the like) of the largest block: to allocate anew costs more than what is computed there."""
    most = [max(sizes) for sizes in zip(*(block[1:] for block in blocks(tokens, state.numel(), TOGETHER)), strict=True)]
    shape = most[0], *state.shape
    return [torch.empty(most[1] + 1, *shape, dtype=state.dtype, device=state.device) for _ in range(many)]


def _decays_and_inputs(u, delta, A, B, decays, hs) -> None:
    """Fill in every token's decays, and what it adds to the state after one place for the first state."""
    torch.mul(delta[..., None, :], A * LOG2_E, out=decays).exp2_()
    torch.mul((delta * u)[..., None, :], B[..., None], out=hs[1:])


def _walk(decays: torch.Tensor, hs: torch.Tensor, first: torch.Tensor) -> None:
    """Replace what the tokens add by the states after them."""
    hs[0] = first
    h, *rows = hs.unbind()
    for decay, row in zip(decays.unbind(), rows, strict=True):
        h = row.addcmul_(decay, h)


def _whole_decay(delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What is left of a state after each chunk, (chunks, batch, states, channels)."""
    return (delta.sum(0)[:, :, None] * (A * LOG2_E)).exp2_()


def _along_chunks(own: torch.Tensor, decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x as it enters each chunk, given what it is before the first: a chunk makes own + decay x of it."""
    kept = torch.empty_like(own)
    kept[0] = x
    for k in range(len(own) - 1):
        torch.addcmul(own[k], decay[k], kept[k], out=kept[k + 1])
    return kept


def backward(u, delta, A, B, C, D, state, starts, grad_out, grad_state) -> tuple[torch.Tensor, ...]:
    """The gradients of all inputs, given those of the outputs and of the state that is left."""
    tokens = u.shape[1]
    dtype = starts.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C)]
    of_A, of_D = A, D
    A, D = A.to(dtype).t().contiguous(), D.to(dtype)
    sum_A, sum_D = A.new_zeros(A.shape, dtype=torch.float64), D.new_zeros(D.shape, dtype=torch.float64)
    carry = grad_state.to(dtype).transpose(1, 2).contiguous()  # what enters a token from its right
    room = _room(tokens, carry, 3)
    for block in reversed(list(blocks(tokens, carry.numel(), TOGETHER))):
        ub, db, Bb, Cb, gyb = (token_major(x, block, dtype) for x in (u, delta, B, C, grad_out))
        hs, decays, lam = (x[: block[2] + (i == 0), : block[1]] for i, x in enumerate(room))
        _decays_and_inputs(ub, db, A, Bb, decays, hs)
        _walk(decays, hs, starts[block[0] // CHUNK :][: block[1]].transpose(2, 3))
        torch.mul(Cb[..., None], gyb[..., None, :], out=lam)
        right = carry[None]
        if block[1] > 1:
            own = torch.zeros_like(lam[0])
            for decay, row in zip(reversed(decays.unbind()), reversed(lam.unbind()), strict=True):
                own.add_(row).mul_(decay)
            right = _along_chunks(own.flip(0), _whole_decay(db, A).flip(0), carry).flip(0)
        lam[-1] += right
        *rows, right = lam.unbind()
        for decay, row in zip(reversed(decays[1:].unbind()), reversed(rows), strict=True):
            right = row.addcmul_(decay, right)
        carry = (lam[0] * decays[0])[0]
        of_exponent = decays.mul_(lam).mul_(hs[:-1])  # the gradient of delta A
        product = hs[1:]
        grad_C = product.mul_(gyb[..., None, :]).sum(4)
        grad_B = torch.mul(lam, (db * ub)[..., None, :], out=product).sum(4)
        sum_A += torch.mul(of_exponent, db[..., None, :], out=product).sum((0, 1, 2))
        sum_D += (gyb * ub).sum((0, 1, 2))
        of_x, of_delta = lam.mul_(Bb[..., None]).sum(3), of_exponent.mul_(A).sum(3)
        made = torch.addcmul(of_x * db, gyb, D), of_delta.addcmul_(of_x, ub), grad_B, grad_C
        for out, x in zip(grads, made, strict=True):
            put_back(out, block, x)
    grad_u, grad_delta, grad_B, grad_C = grads
    grad_A = sum_A.t().to(of_A.dtype, memory_format=torch.contiguous_format)
    grad_h = carry.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, sum_D.to(of_D.dtype), grad_h
