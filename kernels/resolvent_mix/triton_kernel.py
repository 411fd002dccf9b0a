"""Kernels of `resolvent_mix` and their launchers: one program walks a segment of some channels of one sequence.

Where a sequence is cut into several segments, `resolvent_maps` finds each one's map from two starts and `resolvent_borders`
the states between them; `resolvent_walk` evaluates the definition. Backward likewise: `resolvent_adjoint` without and with
its outputs, which recomputes a chunk's states into scratch memory, and `resolvent_carries` between them.
"""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES
from kernels.scan_blocks import CHUNK, chunks_of, segments_of

BLOCK, NUM_WARPS = 64, 1  # two channels a thread
MAP, CARRY = 13, 8  # numbers a channel of a segment's map, forward and backward


@triton.jit
def _step(u, h, t, eta, g_re, g_im, y_re, y_im):
    """g and y of the next token."""
    d_re = h - t * t * g_re
    d_im = eta + t * t * g_im
    m = 1 / (d_re * d_re + d_im * d_im)
    g_re, g_im = d_re * m, d_im * m
    v, w = u - t * y_re, t * y_im
    return g_re, g_im, g_re * v + g_im * w, g_im * v - g_re * w


@triton.jit
def _column(u, h, t, eta, x_re, x_im, y_re, y_im, e_re, e_im):
    """One start's (D_{i-1}, D_i, E_i), a token on."""
    n_re = h * y_re + eta * y_im - t * t * x_re
    n_im = h * y_im - eta * y_re - t * t * x_im
    return y_re, y_im, n_re, n_im, u * y_re - t * e_re, u * y_im - t * e_im


@triton.jit
def _top(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def _pull(u, t, lam_re, lam_im, mu_re, mu_im, g_re, g_im, y_re, y_im):
    """conj(g) lam and conj(g)^2 mu of a token, given lam, what its right adds to mu, its g, and y of the token before."""
    v, w = u - t * y_re, t * y_im
    mu_re += lam_re * v - lam_im * w
    mu_im += lam_im * v + lam_re * w
    s_re, s_im = g_re * g_re - g_im * g_im, 2 * g_re * g_im
    rho_re, rho_im = g_re * lam_re + g_im * lam_im, g_re * lam_im - g_im * lam_re
    return rho_re, rho_im, s_re * mu_re + s_im * mu_im, s_re * mu_im - s_im * mu_re


@triton.jit
def resolvent_maps(u_ptr, h_ptr, t_ptr, eta_ptr, maps, tokens, length, channels, BLOCK: tl.constexpr):
    segment, batch = tl.program_id(0), tl.program_id(1)
    lane = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < channels
    eta = tl.load(eta_ptr + lane, mask=mask, other=1).to(tl.float32)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    at = (batch.to(tl.int64) * tokens + first) * channels + lane
    zero = tl.zeros([BLOCK], tl.float32)
    ax, ay, bx, by, p = zero, zero + 1, zero + 1, zero, zero + 1
    axi, ayi, bxi, byi, ae, aei, be, bei = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(first, end):
        u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32)
        t = tl.load(t_ptr + at, mask=mask, other=0).to(tl.float32)
        ax, axi, ay, ayi, ae, aei = _column(u, h, t, eta, ax, axi, ay, ayi, ae, aei)
        bx, bxi, by, byi, be, bei = _column(u, h, t, eta, bx, bxi, by, byi, be, bei)
        # A power of two that keeps the largest of both starts near 1, from its exponent's bits.
        bits = tl.maximum(_top(ax, axi, ay, ayi), _top(bx, bxi, by, byi)).to(tl.int32, bitcast=True) & 0x7F800000
        s = (0x7F000000 - bits).to(tl.float32, bitcast=True)
        p *= -t * s
        ax, axi, ay, ayi, ae, aei = ax * s, axi * s, ay * s, ayi * s, ae * s, aei * s
        bx, bxi, by, byi, be, bei = bx * s, bxi * s, by * s, byi * s, be * s, bei * s
        at += channels
    plane = tl.num_programs(1).to(tl.int64) * channels
    out = maps + segment * 13 * plane + batch.to(tl.int64) * channels + lane
    tl.store(out, ax, mask=mask)
    tl.store(out + plane, axi, mask=mask)
    tl.store(out + 2 * plane, ay, mask=mask)
    tl.store(out + 3 * plane, ayi, mask=mask)
    tl.store(out + 4 * plane, ae, mask=mask)
    tl.store(out + 5 * plane, aei, mask=mask)
    tl.store(out + 6 * plane, bx, mask=mask)
    tl.store(out + 7 * plane, bxi, mask=mask)
    tl.store(out + 8 * plane, by, mask=mask)
    tl.store(out + 9 * plane, byi, mask=mask)
    tl.store(out + 10 * plane, be, mask=mask)
    tl.store(out + 11 * plane, bei, mask=mask)
    tl.store(out + 12 * plane, p, mask=mask)


@triton.jit
def resolvent_borders(maps, borders, segments, plane, BLOCK: tl.constexpr):
    """`borders` (segments, 4, plane): the first is given, the others are written."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < plane
    at = borders + lane
    g, gi = tl.load(at, mask=mask, other=0), tl.load(at + plane, mask=mask, other=0)
    y, yi = tl.load(at + 2 * plane, mask=mask, other=0), tl.load(at + 3 * plane, mask=mask, other=0)
    m = maps + lane
    for _ in range(segments - 1):
        bx, bxi = tl.load(m + 6 * plane, mask=mask, other=0), tl.load(m + 7 * plane, mask=mask, other=0)
        by, byi = tl.load(m + 8 * plane, mask=mask, other=0), tl.load(m + 9 * plane, mask=mask, other=0)
        be, bei = tl.load(m + 10 * plane, mask=mask, other=0), tl.load(m + 11 * plane, mask=mask, other=0)
        p = tl.load(m + 12 * plane, mask=mask, other=0)
        x = tl.load(m, mask=mask, other=0) + g * bx - gi * bxi
        xi = tl.load(m + plane, mask=mask, other=0) + g * bxi + gi * bx
        d = tl.load(m + 2 * plane, mask=mask, other=1) + g * by - gi * byi
        di = tl.load(m + 3 * plane, mask=mask, other=0) + g * byi + gi * by
        e = tl.load(m + 4 * plane, mask=mask, other=0) + g * be - gi * bei + p * y
        ei = tl.load(m + 5 * plane, mask=mask, other=0) + g * bei + gi * be + p * yi
        s = 1 / (d * d + di * di)
        g, gi = (x * d + xi * di) * s, (xi * d - x * di) * s
        y, yi = (e * d + ei * di) * s, (ei * d - e * di) * s
        at += 4 * plane
        m += 13 * plane
        tl.store(at, g, mask=mask)
        tl.store(at + plane, gi, mask=mask)
        tl.store(at + 2 * plane, y, mask=mask)
        tl.store(at + 3 * plane, yi, mask=mask)


@triton.jit
def resolvent_walk(
    u_ptr, h_ptr, t_ptr, eta_ptr, borders, out_ptr, starts, last, tokens, length, channels,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs, the states at the chunks' starts, and by the last segment the state that is left."""
    segment, batch = tl.program_id(0), tl.program_id(1)
    lane = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < channels
    eta = tl.load(eta_ptr + lane, mask=mask, other=1).to(tl.float32)
    plane = tl.num_programs(1).to(tl.int64) * channels
    own = batch.to(tl.int64) * channels + lane
    at = borders + segment * 4 * plane + own
    g, gi = tl.load(at, mask=mask, other=0), tl.load(at + plane, mask=mask, other=0)
    y, yi = tl.load(at + 2 * plane, mask=mask, other=0), tl.load(at + 3 * plane, mask=mask, other=0)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    row = batch.to(tl.int64) * tokens + first
    at = row * channels + lane
    out = out_ptr + row * 2 * channels + lane
    for i in range(first, end):
        if i % CHUNK == 0:
            kept = starts + (i // CHUNK) * 4 * plane + own
            tl.store(kept, g, mask=mask)
            tl.store(kept + plane, gi, mask=mask)
            tl.store(kept + 2 * plane, y, mask=mask)
            tl.store(kept + 3 * plane, yi, mask=mask)
        u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32)
        t = tl.load(t_ptr + at, mask=mask, other=0).to(tl.float32)
        g, gi, y, yi = _step(u, h, t, eta, g, gi, y, yi)
        tl.store(out, y, mask=mask)
        tl.store(out + channels, yi, mask=mask)
        at += channels
        out += 2 * channels
    if end == tokens:
        tl.store(last + own, g, mask=mask)
        tl.store(last + plane + own, gi, mask=mask)
        tl.store(last + 2 * plane + own, y, mask=mask)
        tl.store(last + 3 * plane + own, yi, mask=mask)


@triton.jit
def resolvent_adjoint(
    u_ptr, h_ptr, t_ptr, eta_ptr, starts, grad_ptr, carries, maps, grad_u, grad_h, grad_t, grad_eta, scratch,
    tokens, length, channels, CHUNK: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS the gradients and, in `maps`, the carries that leave each segment on its left; without, its map."""
    segment, batch = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    lane = tl.program_id(2) * BLOCK + lanes
    mask = lane < channels
    eta = tl.load(eta_ptr + lane, mask=mask, other=1).to(tl.float32)
    plane = tl.num_programs(1).to(tl.int64) * channels
    own = batch.to(tl.int64) * channels + lane
    program = (segment * tl.num_programs(1) + batch).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    room = scratch + program * CHUNK * 4 * BLOCK + lanes
    zero = tl.zeros([BLOCK], tl.float32)
    ly, lyi, lg, lgi, py, pyi, pg, pgi, sum_eta = zero, zero, zero, zero, zero + 1, zero, zero, zero, zero
    if OUTPUTS:
        given = carries + segment * 4 * plane + own
        ly, lyi = tl.load(given, mask=mask, other=0), tl.load(given + plane, mask=mask, other=0)
        lg, lgi = tl.load(given + 2 * plane, mask=mask, other=0), tl.load(given + 3 * plane, mask=mask, other=0)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    chunks = tl.cdiv(end - first, CHUNK)
    for k in range(chunks):
        begin = first + (chunks - 1 - k) * CHUNK
        n = tl.minimum(end - begin, CHUNK)
        row = batch.to(tl.int64) * tokens + begin
        kept = starts + (begin // CHUNK) * 4 * plane + own
        g, gi = tl.load(kept, mask=mask, other=0), tl.load(kept + plane, mask=mask, other=0)
        y, yi = tl.load(kept + 2 * plane, mask=mask, other=0), tl.load(kept + 3 * plane, mask=mask, other=0)
        tl.debug_barrier()
        for i in range(n):
            slot = room + i * 4 * BLOCK
            tl.store(slot, g)
            tl.store(slot + BLOCK, gi)
            tl.store(slot + 2 * BLOCK, y)
            tl.store(slot + 3 * BLOCK, yi)
            at = (row + i) * channels + lane
            u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
            h = tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32)
            t = tl.load(t_ptr + at, mask=mask, other=0).to(tl.float32)
            g, gi, y, yi = _step(u, h, t, eta, g, gi, y, yi)
        tl.debug_barrier()
        for j in range(n):
            i = n - 1 - j
            slot = room + i * 4 * BLOCK
            before, before_i = tl.load(slot), tl.load(slot + BLOCK)
            y, yi = tl.load(slot + 2 * BLOCK), tl.load(slot + 3 * BLOCK)
            at = (row + i) * channels + lane
            u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
            t = tl.load(t_ptr + at, mask=mask, other=0).to(tl.float32)
            of_out = grad_ptr + (row + i) * 2 * channels + lane
            ly += tl.load(of_out, mask=mask, other=0).to(tl.float32)
            lyi += tl.load(of_out + channels, mask=mask, other=0).to(tl.float32)
            rho, rho_i, kappa, kappa_i = _pull(u, t, ly, lyi, lg, lgi, g, gi, y, yi)
            ly, lyi, lg, lgi = -t * rho, -t * rho_i, t * t * kappa, t * t * kappa_i
            if OUTPUTS:
                tl.store(grad_u + at, rho, mask=mask)
                tl.store(grad_h + at, -kappa, mask=mask)
                tl.store(grad_t + at, 2 * t * (kappa * before + kappa_i * before_i) - rho * y - rho_i * yi, mask=mask)
                sum_eta += kappa_i
            else:
                rho, rho_i, kappa, kappa_i = _pull(u, t, py, pyi, pg, pgi, g, gi, y, yi)
                py, pyi, pg, pgi = -t * rho, -t * rho_i, t * t * kappa, t * t * kappa_i
            g, gi = before, before_i
    if OUTPUTS:
        tl.store(grad_eta + segment * plane + own, sum_eta, mask=mask)
        out = maps + segment * 4 * plane + own
    else:
        out = maps + segment * 8 * plane + own
        tl.store(out + 4 * plane, py, mask=mask)
        tl.store(out + 5 * plane, pyi, mask=mask)
        tl.store(out + 6 * plane, pg, mask=mask)
        tl.store(out + 7 * plane, pgi, mask=mask)
    tl.store(out, ly, mask=mask)
    tl.store(out + plane, lyi, mask=mask)
    tl.store(out + 2 * plane, lg, mask=mask)
    tl.store(out + 3 * plane, lgi, mask=mask)


@triton.jit
def resolvent_carries(maps, carries, segments, plane, BLOCK: tl.constexpr):
    """`carries` (segments, 4, plane) of y and of g: the last is given, the others are written."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < plane
    at = carries + (segments - 1) * 4 * plane + lane
    y, yi = tl.load(at, mask=mask, other=0), tl.load(at + plane, mask=mask, other=0)
    g, gi = tl.load(at + 2 * plane, mask=mask, other=0), tl.load(at + 3 * plane, mask=mask, other=0)
    m = maps + (segments - 1) * 8 * plane + lane
    for _ in range(segments - 1):
        p, pi = tl.load(m + 4 * plane, mask=mask, other=0), tl.load(m + 5 * plane, mask=mask, other=0)
        r, ri = tl.load(m + 6 * plane, mask=mask, other=0), tl.load(m + 7 * plane, mask=mask, other=0)
        q, qi = p * p - pi * pi, 2 * p * pi
        n = tl.load(m + 2 * plane, mask=mask, other=0) + r * y - ri * yi + q * g - qi * gi
        ni = tl.load(m + 3 * plane, mask=mask, other=0) + r * yi + ri * y + q * gi + qi * g
        own, own_i = tl.load(m, mask=mask, other=0), tl.load(m + plane, mask=mask, other=0)
        y, yi = own + p * y - pi * yi, own_i + p * yi + pi * y
        g, gi = n, ni
        at -= 4 * plane
        m -= 8 * plane
        tl.store(at, y, mask=mask)
        tl.store(at + plane, yi, mask=mask)
        tl.store(at + 2 * plane, g, mask=mask)
        tl.store(at + 3 * plane, gi, mask=mask)


def forward(u, h, t, eta, g, y) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`; one launch, three where a sequence is cut into segments."""
    u, h, t, eta = (x.contiguous() for x in (u, h, t, eta))
    batch, tokens, channels = u.shape
    segments, length = segments_of(tokens, 4 * batch * channels)
    grid, plane = (segments, batch, triton.cdiv(channels, BLOCK)), batch * channels
    fp32 = {"dtype": torch.float32, "device": u.device}
    out = torch.empty(batch, tokens, 2 * channels, dtype=u.dtype, device=u.device)
    starts, last = torch.empty(chunks_of(tokens), 4, batch, channels, **fp32), torch.empty(4, batch, channels, **fp32)
    borders = torch.empty(segments, 4, batch, channels, **fp32)
    borders[0] = torch.cat([g, y], 1).transpose(0, 1)
    options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(u):
        if segments > 1:
            maps = torch.empty(segments, MAP, plane, **fp32)
            resolvent_maps[grid](u, h, t, eta, maps, tokens, length, channels, **options)
            resolvent_borders[(triton.cdiv(plane, BLOCK),)](maps, borders, segments, plane, **options)
        resolvent_walk[grid](
            u, h, t, eta, borders, out, starts, last, tokens, length, channels, CHUNK=CHUNK, **options
        )  # fmt: skip
    return out, *(x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in last.split(2)), starts


def backward(u, h, t, eta, g, y, starts, grad_out, grad_g, grad_y) -> tuple[torch.Tensor, ...]:
    """As `reference.backward`."""
    u, h, t, eta, grad_out = (x.contiguous() for x in (u, h, t, eta, grad_out))
    batch, tokens, channels = u.shape
    segments, length = segments_of(tokens, 4 * batch * channels)
    grid, plane = (segments, batch, triton.cdiv(channels, BLOCK)), batch * channels
    fp32 = {"dtype": torch.float32, "device": u.device}
    grads = [torch.empty_like(x) for x in (u, h, t)]
    sums = torch.empty(segments, batch, channels, **fp32)
    scratch = torch.empty(grid[0] * grid[1] * grid[2], CHUNK, 4, BLOCK, **fp32)
    carries, left = (torch.empty(segments, 4, batch, channels, **fp32) for _ in range(2))
    carries[-1] = torch.cat([grad_y, grad_g], 1).transpose(0, 1)
    arguments = (*grads, sums, scratch, tokens, length, channels)
    options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(u):
        if segments > 1:
            maps = torch.empty(segments, CARRY, plane, **fp32)
            resolvent_adjoint[grid](
                u, h, t, eta, starts, grad_out, carries, maps, *arguments, CHUNK=CHUNK, OUTPUTS=False, **options
            )  # fmt: skip
            resolvent_carries[(triton.cdiv(plane, BLOCK),)](maps, carries, segments, plane, **options)
        resolvent_adjoint[grid](
            u, h, t, eta, starts, grad_out, carries, left, *arguments, CHUNK=CHUNK, OUTPUTS=True, **options
        )  # fmt: skip
    of_y, of_g = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in left[0].split(2))
    return *grads, sums.sum((0, 1), dtype=torch.float64).to(eta.dtype), of_g, of_y


def compile_specs() -> list[CompileSpec]:
    """Every kernel, for a sequence of many segments. None is a stream: a token's channels are all that is read at once."""
    specs, batch, tokens, channels = [], 1, 131072, 768
    for name, dtype in DTYPES.items():
        u, grad_out = (torch.empty(batch, tokens, n * channels, dtype=dtype, device="meta") for n in (1, 2))
        eta, state = (torch.empty(*shape, device="meta") for shape in ((channels,), (batch, 2, channels)))
        starts = torch.empty(chunks_of(tokens), 4, batch, channels, device="meta")
        names = [("resolvent_maps", "resolvent_borders", "resolvent_walk"),
                 ("resolvent_adjoint", "resolvent_carries", "resolvent_gradients")]  # fmt: skip
        calls = [
            (forward, (u, u, u, eta, state, state)),
            (backward, (u, u, u, eta, state, state, starts, grad_out, state, state)),
        ]
        for kernels, (launch, arguments) in zip(names, calls, strict=True):
            labels = [(kernel, name, f"{tokens}x{channels}") for kernel in kernels]
            specs += as_launched(labels, launch, *arguments, streaming=False)
    return specs
