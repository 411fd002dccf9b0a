"""The definition of `resolvent_mix` in complex arithmetic, token by token, and its chunked evaluation in plain torch.

The chunked way holds real and imaginary parts in one tensor, side by side in its first dimension, and knows what repeats:
the adjoint's two carries are -t conj(g) lam and t^2 conj(g)^2 mu, whose factors are the gradients themselves.
"""

import math

import torch

from kernels.scan_blocks import CHUNK, blocks, chunks_of, put_back, scan_dtype, token_major

TOGETHER = 2**14  # numbers
MOST_BITS = 96
"""How many powers of two the products of a chunk may grow or shrink by before they are rescaled; fp32 holds 126."""


def definition(u, h, t, eta, g, y) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(outputs, g, y) of `resolvent_mix`, token by token, in fp32 or float64. Autograd can differentiate it."""
    dtype = scan_dtype(u, h, t, eta)
    z = torch.complex(torch.zeros_like(eta, dtype=dtype), eta.to(dtype))
    g, y = (torch.complex(*x.to(dtype).unbind(1)) for x in (g, y))
    outputs = []
    for u_i, h_i, t_i in zip(*(x.to(dtype).unbind(1) for x in (u, h, t)), strict=True):
        g = 1 / (h_i - z - t_i**2 * g)
        y = g * (u_i - t_i * y)
        outputs.append(y)
    out = torch.stack(outputs, 1)
    return torch.cat([out.real, out.imag], -1).to(u.dtype), *(torch.stack([x.real, x.imag], 1) for x in (g, y))


def forward(u, h, t, eta, g, y) -> tuple[torch.Tensor, ...]:
    """(outputs, g, y, the states at the chunks' starts (chunks, 4, batch, channels)), as the operator returns them."""
    batch, tokens, channels = u.shape
    dtype = scan_dtype(u, h, t, eta)
    out = torch.empty(batch, tokens, 2 * channels, dtype=u.dtype, device=u.device)
    starts = torch.empty(chunks_of(tokens), 4, batch, channels, dtype=dtype, device=u.device)
    eta = eta.to(dtype)
    state = torch.cat([g, y], 1).transpose(0, 1)  # (4, batch, channels)
    period, scale = _rescaling(u, h, eta)
    for block in blocks(tokens, batch * channels, TOGETHER):
        own = starts[block[0] // CHUNK :][: block[1]]
        ub, hb, tb = (token_major(x, block, dtype) for x in (u, h, t))
        t2 = tb * tb
        own.copy_(state[None] if block[1] == 1 else _chunk_starts(ub, hb, tb, t2, eta, state, period, scale))
        gs, ys = _walk(ub, hb, tb, t2, eta, own)
        put_back(out[..., :channels], block, ys[1:, 0])
        put_back(out[..., channels:], block, ys[1:, 1])
        state = torch.cat([gs[-1, :, -1], ys[-1, :, -1]])
    return out, *(x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in state.split(2)), starts


def _rescaling(u, h, eta) -> tuple[int, float]:
    """How many tokens the products of a chunk may go without being rescaled, and a power of two that brings u below 1."""
    low, high = (x.item() for x in torch.aminmax(h))
    low_eta, high_eta = (x.item() for x in torch.aminmax(eta))
    growth = max(abs(low), abs(high)) + high_eta + 1
    if not (growth < math.inf and low_eta > 0):  # a NaN or an Inf will show in what is computed
        return 1, 1.0
    top = max(abs(x.item()) for x in torch.aminmax(u))
    scale = 2.0 ** -max(-120, math.frexp(top)[1]) if 0 < top < math.inf else 1.0
    return max(1, min(CHUNK, int((MOST_BITS - 8) / max(math.log2(growth), -math.log2(low_eta), 1)))), scale


def _walk(u, h, t, t2, eta, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """g and y (1 + tokens, 2, chunks, batch, channels) of the definition, from the chunks' starts on; those are first."""
    tokens = len(u)
    gs = torch.empty(tokens + 1, 2, *u.shape[1:], dtype=u.dtype, device=u.device)
    ys = torch.empty_like(gs)
    gs[0], ys[0] = starts[:, :2].transpose(0, 1), starts[:, 2:].transpose(0, 1)
    eta, m, w = eta.expand_as(u[0]).contiguous(), torch.empty_like(u[0]), torch.empty_like(u[0])
    d = torch.empty_like(gs[0])
    d_re, d_im = d
    by_token = (x.unbind() for x in (u, h, t, t2, gs[:-1], ys[:-1], gs[1:], ys[1:]))
    for u_i, h_i, t_i, t2_i, (g_re, g_im), (y_re, y_im), g, y in zip(*by_token, strict=True):
        torch.addcmul(h_i, t2_i, g_re, value=-1, out=d_re)
        torch.addcmul(eta, t2_i, g_im, out=d_im)  # the denominator's conjugate
        torch.mul(d_re, d_re, out=m).addcmul_(d_im, d_im).reciprocal_()
        torch.mul(d, m, out=g)
        torch.addcmul(u_i, t_i, y_re, value=-1, out=m)
        torch.mul(t_i, y_im, out=w)
        torch.mul(g, m, out=y)
        y[0].addcmul_(g[1], w)
        y[1].addcmul_(g[0], w, value=-1)
    return gs, ys


def _chunk_starts(u, h, t, t2, eta, state, period, scale) -> torch.Tensor:
    """The states (chunks, 4, batch, channels) at the starts of chunks, of which `state` is the first.

    D_i and E_i are those of the package's docstring. Each chunk's map is found from two starts at once,
    (D_{i-1}, D_i) = (0, 1) and (1, 0). E is held as (-1)^i `scale` E.
    """
    tokens, chunks = u.shape[:2]
    x, y, e = u.new_zeros(3, 2, 2, *u.shape[1:])  # real and imaginary, by start
    x[0, 1], y[0, 0] = 1, 1
    product, new = torch.ones_like(u[0]), torch.empty_like(x)
    eta = eta.expand_as(u[0]).contiguous()
    sign = scale
    for i, (u_i, h_i, t_i, t2_i) in enumerate(zip(u.unbind(), h.unbind(), t.unbind(), t2.unbind(), strict=True), 1):
        sign = -sign
        torch.mul(y, h_i, out=new)
        new[0].addcmul_(eta, y[1])
        new[1].addcmul_(eta, y[0], value=-1)
        new.addcmul_(t2_i, x, value=-1)
        e.mul_(t_i).addcmul_(u_i, y, value=sign)
        product.mul_(t_i)
        x, y, new = y, new, x
        if i % period == 0 or i == tokens:
            top = torch.maximum(x.abs().amax((0, 1)), y.abs().amax((0, 1)))
            shrink = torch.ldexp(torch.ones_like(top), -torch.frexp(top).exponent)
            for held in (x, y, e, product):
                held *= shrink
    last = 1 / scale if tokens % 2 == 0 else -1 / scale
    x, y, e = (torch.complex(held[0], held[1]) for held in (x, y, e * last))
    product = product if tokens % 2 == 0 else -product
    g, w = (torch.complex(part[0], part[1]) for part in state.split(2))
    kept = []
    for k in range(chunks):
        kept.append(torch.stack([g, w]))
        below = torch.addcmul(y[0, k], g, y[1, k]).reciprocal_()
        above = torch.addcmul(e[0, k], g, e[1, k])
        g, w = torch.addcmul(x[0, k], g, x[1, k]).mul_(below), above.addcmul_(w, product[k]).mul_(below)
    return torch.view_as_real(torch.stack(kept)).movedim(-1, 2).flatten(1, 2)


def _times(factor: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """conj(factor) x into `out`: real and imaginary parts are the first dimension of each."""
    torch.mul(x, factor[0], out=out)
    out[0].addcmul_(factor[1], x[1])
    out[1].addcmul_(factor[1], x[0], value=-1)
    return out


def backward(u, h, t, eta, g, y, starts, grad_out, grad_g, grad_y) -> tuple[torch.Tensor, ...]:
    """The gradients of u, h, t, eta, g and y, given those of the outputs and of the state that is left."""
    batch, tokens, channels = u.shape
    dtype = starts.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, h, t)]
    sum_eta = u.new_zeros(channels, dtype=torch.float64)
    eta_in, eta = eta, eta.to(dtype)
    # What enters a token from its right: of y and of g, (2, batch, channels) each.
    carry_y, carry_g = (x.transpose(0, 1).to(dtype) for x in (grad_y, grad_g))
    for block in reversed(list(blocks(tokens, batch * channels, TOGETHER))):
        own = starts[block[0] // CHUNK :][: block[1]]
        ub, hb, tb = (token_major(x, block, dtype) for x in (u, h, t))
        gyb = torch.stack([token_major(x, block, dtype) for x in grad_out.split(channels, -1)], 1)
        t2 = tb * tb
        gs, ys = _walk(ub, hb, tb, t2, eta, own)
        v = ub - tb * ys[:-1, 0], tb * ys[:-1, 1]  # u - t y is v[0] - i v[1]
        squares = torch.stack([gs[1:, 0].square() - gs[1:, 1].square(), 2 * gs[1:, 0] * gs[1:, 1]], 1)
        rights = (carry_y[:, None], carry_g[:, None])
        if block[1] > 1:
            rights = _chunk_carries(gs[1:], squares, tb, t2, v, gyb, carry_y, carry_g)
        rho, kappa, carry_y, carry_g = _adjoint(gs[1:], squares, tb, t2, v, gyb, *rights)
        carry_y, carry_g = carry_y[:, 0], carry_g[:, 0]
        grad_t = (kappa * gs[:-1]).sum(1).mul_(tb).mul_(2).sub_((rho * ys[:-1]).sum(1))
        for out, made in zip(grads, (rho[:, 0], -kappa[:, 0], grad_t), strict=True):
            put_back(out, block, made)
        sum_eta += kappa[:, 1].sum((0, 1, 2))
    return (
        *grads,
        sum_eta.to(eta_in.dtype),
        *(x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (carry_g, carry_y)),
    )


def _adjoint(gs, squares, t, t2, v, grad_y, carry_y, carry_g) -> tuple[torch.Tensor, ...]:
    """conj(g) lam and conj(g)^2 mu of every token, and the carries of y and g that leave the chunks on their left."""
    rho, kappa = torch.empty_like(gs), torch.empty_like(gs)
    carry_y, carry_g = carry_y.clone().expand_as(gs[0]), carry_g.clone().expand_as(gs[0])
    lam, mu = torch.empty_like(gs[0]), torch.empty_like(gs[0])
    carry_y, carry_g = carry_y.contiguous(), carry_g.contiguous()
    for i in range(len(gs) - 1, -1, -1):
        v_re, v_im = v[0][i], v[1][i]
        torch.add(grad_y[i], carry_y, out=lam)
        torch.addcmul(carry_g, lam, v_re, out=mu)
        mu[0].addcmul_(lam[1], v_im, value=-1)
        mu[1].addcmul_(lam[0], v_im)
        torch.mul(_times(gs[i], lam, rho[i]), t[i], out=carry_y).neg_()
        torch.mul(_times(squares[i], mu, kappa[i]), t2[i], out=carry_g)
    return rho, kappa, carry_y, carry_g


def _chunk_carries(gs, squares, t, t2, v, grad_y, carry_y, carry_g) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters each chunk from its right, (2, chunks, batch, channels) of y and of g, given what enters the last.

    Both leave a chunk as carry_y' = l + p carry_y and carry_g' = m + r carry_y + p^2 carry_g, found from two starts at once:
    the chunk's own gradients with no carry, and a carry of 1 with no gradients.
    """
    chunks = gs.shape[2]
    lam, mu = gs.new_zeros(2, 2, 2, *gs.shape[2:])  # real and imaginary, by start
    lam[0, 1] = 1
    new, other, factor = torch.empty_like(lam), torch.empty_like(lam), torch.empty_like(gs[0])
    for i in range(len(gs) - 1, -1, -1):
        v_re, v_im = v[0][i], v[1][i]
        lam[:, 0] += grad_y[i]
        mu.addcmul_(lam, v_re)
        mu[0].addcmul_(lam[1], v_im, value=-1)
        mu[1].addcmul_(lam[0], v_im)
        torch.mul(gs[i], t[i], out=factor).neg_()
        lam, new = _times(factor, lam, new), lam
        torch.mul(squares[i], t2[i], out=factor)
        mu, other = _times(factor, mu, other), mu
    (own_y, p), (own_g, r) = (torch.complex(x[0], x[1]) for x in (lam, mu))
    at_y, at_g = (torch.complex(x[0], x[1]) for x in (carry_y, carry_g))
    kept = []
    for k in range(chunks - 1, -1, -1):
        kept.append(torch.stack([at_y, at_g]))
        at_y, at_g = torch.addcmul(own_y[k], p[k], at_y), own_g[k] + r[k] * at_y + p[k] * p[k] * at_g
    kept = torch.view_as_real(torch.stack(kept[::-1], 1)).movedim(-1, 1)  # (y and g, real and imaginary, chunks, ...)
    return kept[0], kept[1]
