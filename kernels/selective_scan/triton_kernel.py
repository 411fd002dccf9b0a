"""Kernels of `selective_scan` and their launchers: one program walks a segment of some channels of one sequence.

Where a sequence is cut into several segments, `scan_maps` finds what each makes of zeros and `scan_borders` the states
between them; `scan_walk` evaluates the definition. Backward likewise: `scan_adjoint` without and with its outputs, which
recomputes a chunk's states into scratch memory, and `scan_borders` from the right between them. Gradients of what channels or
segments share are written apart and added afterwards: no float atomics.
"""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES
from kernels.scan_blocks import CHUNK, chunks_of, segments_of

TILE, NUM_WARPS = 1024, 4  # numbers a program, 8 a thread
REGISTERS = 168  # of the adjoint; left alone, the compiler takes 128 on sm_100 and spills


@triton.jit
def _next(h, u, delta, A, b):
    """The state after a token: h, A (channels, states), u, delta (channels,), b (states,)."""
    return tl.exp(delta[:, None] * A) * h + (delta * u)[:, None] * b[None, :]


@triton.jit
def scan_maps(
    u_ptr, delta_ptr, a_ptr, b_ptr, own, sums, tokens, length, channels, states, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """What each segment makes of a state of zeros (segments, batch, channels, states), and its sum of delta."""
    segment, batch = tl.program_id(0), tl.program_id(1)
    lane, number = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask, mask_n = lane < channels, number < states
    both, cell = mask[:, None] & mask_n[None, :], lane[:, None] * states + number[None, :]
    A = tl.load(a_ptr + cell, mask=both, other=0).to(tl.float32)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    row = batch.to(tl.int64) * tokens + first
    at, at_n = row * channels + lane, row * states + number
    h, total = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _ in range(first, end):
        u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
        delta = tl.load(delta_ptr + at, mask=mask, other=0).to(tl.float32)
        b = tl.load(b_ptr + at_n, mask=mask_n, other=0).to(tl.float32)
        h = _next(h, u, delta, A, b)
        total += delta
        at += channels
        at_n += states
    row = (segment * tl.num_programs(1) + batch).to(tl.int64) * channels
    tl.store(own + row * states + cell, h, mask=both)
    tl.store(sums + row + lane, total, mask=mask)


@triton.jit
def scan_borders(own, sums, a_ptr, borders, segments, plane, channels, states, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    """`borders` (segments, plane): the first is given (REVERSED: the last), the others are written."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < plane
    A = tl.load(a_ptr + lane % (channels * states), mask=mask, other=0).to(tl.float32)
    step, segment = 1, tl.zeros([], tl.int64)
    if REVERSED:
        step, segment = -1, segment + segments - 1
    x = tl.load(borders + segment * plane + lane, mask=mask, other=0)
    for _ in range(segments - 1):
        total = tl.load(sums + segment * (plane // states) + lane // states, mask=mask, other=0)
        x = tl.load(own + segment * plane + lane, mask=mask, other=0) + tl.exp(A * total) * x
        segment += step
        tl.store(borders + segment * plane + lane, x, mask=mask)


@triton.jit
def scan_walk(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, borders, out_ptr, starts, last, tokens, length, channels, states,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Outputs, the states at the chunks' starts, and by the last segment the state that is left."""
    segment, batch = tl.program_id(0), tl.program_id(1)
    lane, number = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask, mask_n = lane < channels, number < states
    both, cell = mask[:, None] & mask_n[None, :], lane[:, None] * states + number[None, :]
    A = tl.load(a_ptr + cell, mask=both, other=0).to(tl.float32)
    D = tl.load(d_ptr + lane, mask=mask, other=0).to(tl.float32)
    plane = tl.num_programs(1).to(tl.int64) * channels * states
    own = batch.to(tl.int64) * channels * states + cell
    h = tl.load(borders + segment * plane + own, mask=both, other=0)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    row = batch.to(tl.int64) * tokens + first
    at, at_n = row * channels + lane, row * states + number
    for i in range(first, end):
        if i % CHUNK == 0:
            tl.store(starts + (i // CHUNK) * plane + own, h, mask=both)
        u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
        delta = tl.load(delta_ptr + at, mask=mask, other=0).to(tl.float32)
        b = tl.load(b_ptr + at_n, mask=mask_n, other=0).to(tl.float32)
        c = tl.load(c_ptr + at_n, mask=mask_n, other=0).to(tl.float32)
        h = _next(h, u, delta, A, b)
        tl.store(out_ptr + at, tl.sum(h * c[None, :], 1) + D * u, mask=mask)
        at += channels
        at_n += states
    if end == tokens:
        tl.store(last + own, h, mask=both)


@triton.jit
def scan_adjoint(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, starts, grad_ptr, carries, left, sums,
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_d, scratch, tokens, length, channels, states,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS the gradients and, in `left`, what leaves each segment on its left; without, what it makes of zeros."""
    segment, batch, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, number = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask, mask_n = lane < channels, number < states
    both, cell = mask[:, None] & mask_n[None, :], lane[:, None] * states + number[None, :]
    A = tl.load(a_ptr + cell, mask=both, other=0).to(tl.float32)
    D = tl.load(d_ptr + lane, mask=mask, other=0).to(tl.float32)
    batches = tl.num_programs(1).to(tl.int64)
    plane = batches * channels * states
    own = batch.to(tl.int64) * channels * states + cell
    program = (segment * batches + batch) * tl.num_programs(2) + block
    room = scratch + program * CHUNK * BLOCK * WIDTH + tl.arange(0, BLOCK)[:, None] * WIDTH + number[None, :]
    carry, sum_a = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    total, sum_d = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if OUTPUTS:
        carry = tl.load(carries + segment * plane + own, mask=both, other=0)
    first, end = segment * length, tl.minimum(segment * length + length, tokens)
    chunks = tl.cdiv(end - first, CHUNK)
    for k in range(chunks):
        begin = first + (chunks - 1 - k) * CHUNK
        n = tl.minimum(end - begin, CHUNK)
        row = batch.to(tl.int64) * tokens + begin
        h = tl.zeros([BLOCK, WIDTH], tl.float32)
        if OUTPUTS:
            h = tl.load(starts + (begin // CHUNK) * plane + own, mask=both, other=0)
            tl.debug_barrier()
            for i in range(n):
                tl.store(room + i * BLOCK * WIDTH, h)
                u = tl.load(u_ptr + (row + i) * channels + lane, mask=mask, other=0).to(tl.float32)
                delta = tl.load(delta_ptr + (row + i) * channels + lane, mask=mask, other=0).to(tl.float32)
                b = tl.load(b_ptr + (row + i) * states + number, mask=mask_n, other=0).to(tl.float32)
                h = _next(h, u, delta, A, b)
            tl.debug_barrier()
        for j in range(n):
            i = n - 1 - j
            at, at_n = (row + i) * channels + lane, (row + i) * states + number
            delta = tl.load(delta_ptr + at, mask=mask, other=0).to(tl.float32)
            c = tl.load(c_ptr + at_n, mask=mask_n, other=0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=mask, other=0).to(tl.float32)
            lam = carry + grad[:, None] * c[None, :]
            carry = lam * tl.exp(delta[:, None] * A)
            if OUTPUTS:
                u = tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32)
                b = tl.load(b_ptr + at_n, mask=mask_n, other=0).to(tl.float32)
                before = tl.load(room + i * BLOCK * WIDTH)
                w, q = tl.sum(lam * b[None, :], 1), carry * before
                tl.store(grad_u + at, delta * w + D * grad, mask=mask)
                tl.store(grad_delta + at, tl.sum(q * A, 1) + u * w, mask=mask)
                shared = (block * batches + batch).to(tl.int64) * tokens * states + (begin + i).to(tl.int64) * states + number
                tl.store(grad_b + shared, tl.sum(lam * (delta * u)[:, None], 0), mask=mask_n)
                tl.store(grad_c + shared, tl.sum(h * grad[:, None], 0), mask=mask_n)
                sum_a += delta[:, None] * q
                sum_d += u * grad
                h = before
            else:
                total += delta
    tl.store(left + segment * plane + own, carry, mask=both)
    row = (segment * batches + batch) * channels
    if OUTPUTS:
        tl.store(grad_a + row * states + cell, sum_a, mask=both)
        tl.store(grad_d + row + lane, sum_d, mask=mask)
    else:
        tl.store(sums + row + lane, total, mask=mask)


def _cut(u: torch.Tensor, states: int) -> tuple[int, int, tuple[int, int, int], dict[str, int]]:
    """Segments, tokens a segment, the grid, and the constants of a tile of channels and states."""
    batch, tokens, channels = u.shape
    segments, length = segments_of(tokens, batch * channels * states)
    width = triton.next_power_of_2(states)
    block = max(1, min(TILE // width, triton.next_power_of_2(channels)))
    return segments, length, (segments, batch, triton.cdiv(channels, block)), {"BLOCK": block, "WIDTH": width}


def forward(u, delta, A, B, C, D, state) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`; one launch, three where a sequence is cut into segments."""
    u, delta, A, B, C, D = (x.contiguous() for x in (u, delta, A, B, C, D))
    (batch, tokens, channels), states = u.shape, A.shape[1]
    segments, length, grid, tile = _cut(u, states)
    fp32 = {"dtype": torch.float32, "device": u.device}
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    starts, last = torch.empty(chunks_of(tokens), *state.shape, **fp32), torch.empty(state.shape, **fp32)
    borders = torch.empty(segments, *state.shape, **fp32)
    borders[0] = state
    with torch.cuda.device_of(u):
        if segments > 1:
            own, sums = torch.empty(borders.shape, **fp32), torch.empty(segments, batch, channels, **fp32)
            scan_maps[grid](u, delta, A, B, own, sums, tokens, length, channels, states, **tile, num_warps=NUM_WARPS)
            _join(own, sums, A, borders, False)
        scan_walk[grid](
            u, delta, A, B, C, D, borders, out, starts, last, tokens, length, channels, states,
            CHUNK=CHUNK, **tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, last, starts


def _join(own, sums, A, borders, from_the_right: bool) -> None:
    plane, block = borders[0].numel(), 128
    scan_borders[(triton.cdiv(plane, block),)](
        own, sums, A, borders, len(borders), plane, *A.shape, BLOCK=block, REVERSED=from_the_right, num_warps=NUM_WARPS
    )  # fmt: skip


def backward(u, delta, A, B, C, D, state, starts, grad_out, grad_state) -> tuple[torch.Tensor, ...]:
    """As `reference.backward`."""
    u, delta, A, B, C, D, grad_out = (x.contiguous() for x in (u, delta, A, B, C, D, grad_out))
    (batch, tokens, channels), states = u.shape, A.shape[1]
    segments, length, grid, tile = _cut(u, states)
    fp32 = {"dtype": torch.float32, "device": u.device}
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    of_a, of_d = torch.empty(segments, *state.shape, **fp32), torch.empty(segments, batch, channels, **fp32)
    of_b, of_c = (torch.empty(grid[2], batch, tokens, states, **fp32) for _ in range(2))
    scratch = torch.empty(grid[0] * grid[1] * grid[2], CHUNK, tile["BLOCK"], tile["WIDTH"], **fp32)
    carries, left = (torch.empty(segments, *state.shape, **fp32) for _ in range(2))
    carries[-1] = grad_state
    sums = torch.empty(segments, batch, channels, **fp32)
    outputs = (grad_u, grad_delta, of_a, of_b, of_c, of_d, scratch, tokens, length, channels, states)
    options = {"CHUNK": CHUNK, **tile, "num_warps": NUM_WARPS, "maxnreg": REGISTERS}
    with torch.cuda.device_of(u):
        if segments > 1:
            scan_adjoint[grid](
                u, delta, A, B, C, D, starts, grad_out, carries, left, sums, *outputs, OUTPUTS=False, **options
            )  # fmt: skip
            _join(left, sums, A, carries, True)
        scan_adjoint[grid](u, delta, A, B, C, D, starts, grad_out, carries, left, sums, *outputs, OUTPUTS=True, **options)
    grad_A, grad_D = of_a.sum((0, 1), dtype=torch.float64).to(A.dtype), of_d.sum((0, 1), dtype=torch.float64).to(D.dtype)
    return grad_u, grad_delta, grad_A, of_b.sum(0).to(B.dtype), of_c.sum(0).to(C.dtype), grad_D, left[0].clone()


def compile_specs() -> list[CompileSpec]:
    """Every kernel, for a sequence of many segments. None is a stream: a token's channels are all that is read at once."""
    specs, batch, tokens, channels, states = [], 1, 131072, 1536, 16
    for name, dtype in DTYPES.items():
        u, B = (torch.empty(batch, tokens, width, dtype=dtype, device="meta") for width in (channels, states))
        A, D, state = (torch.empty(*shape, device="meta") for shape in ((channels, states), (channels,), (1, channels, states)))
        starts = torch.empty(chunks_of(tokens), batch, channels, states, device="meta")
        names = [("scan_maps", "scan_borders", "scan_walk"), ("scan_adjoint", "scan_borders_right", "scan_gradients")]
        calls = [(forward, (u, u, A, B, B, D, state)), (backward, (u, u, A, B, B, D, state, starts, u, state))]
        for kernels, (launch, arguments) in zip(names, calls, strict=True):
            labels = [(kernel, name, f"{tokens}x{channels}x{states}") for kernel in kernels]
            specs += as_launched(labels, launch, *arguments, streaming=False)
    return specs
