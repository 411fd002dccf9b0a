"""Triton kernels for cross-entropy. The maths and the traffic are in the package docstring.

`cross_entropy_rows` gives a row to a program. The running maximum and sum are kept per GROUP of
neighbouring columns that sit in one thread, so that the loop over the row has no barrier and
1 + 1/GROUP exponentials per element; the groups meet once, at the end of the row.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kernels.logit_stats.triton_kernel import abs_bits, load_key, record_row

_WARPS = 8
_NO_MAX = tl.constexpr(float("-inf"))


@triton.jit
def load_tile(row_ptr, start, width, valid, MASKED: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr):
    """One tile as fp32, -inf outside the valid columns. `width` carries the alignment, `valid` need not."""
    cols = start + tl.arange(0, BLOCK)
    if MASKED:
        z = tl.load(row_ptr + cols, mask=cols < width, other=_NO_MAX, eviction_policy=HINT).to(tl.float32)
        z = tl.where(cols < valid, z, _NO_MAX)
    else:
        z = tl.load(row_ptr + cols, eviction_policy=HINT).to(tl.float32)
    return z, cols


@triton.jit
def absorb_tile(z, cols, valid, anchor, m, s, d, top,
                MASKED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
                GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Fold a tile into the groups' running maximum m, sum of exponentials s, differences d and largest bits."""
    tile = tl.reshape(z, [BLOCK // GROUP, GROUP])
    new = tl.maximum(m, tl.max(tile, 1))
    shift = tl.where(new == _NO_MAX, 0.0, new)  # a group of -inf only: exp(-inf - 0), never exp(-inf + inf)
    s = s * tl.exp(m - shift) + tl.sum(tl.exp(tile - shift[:, None]), 1)
    if SMOOTH:
        diff = z - anchor
        if MASKED:
            diff = tl.where(cols < valid, diff, 0.0)
        d += tl.sum(tl.reshape(diff, [BLOCK // GROUP, GROUP]), 1)
    if STATS:
        bits = abs_bits(z)
        if MASKED:
            bits = tl.where(cols < valid, bits, -1)
        top = tl.maximum(top, tl.max(tl.reshape(bits, [BLOCK // GROUP, GROUP]), 1))
    return new, s, d, top


@triton.jit
def store_gradient(grad_ptr, z, cols, target, m, slope, flat, hit, width, valid,
                   MASKED: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """slope * exp(z - m) - flat, minus `hit` at the target; 0 in pad columns."""
    g = tl.exp(z - m) * slope - flat
    g = tl.where(cols == target, g - hit, g)
    if MASKED:
        g = tl.where(cols < valid, g, 0.0)
        tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < width, eviction_policy=HINT)
    else:
        tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), eviction_policy=HINT)


@triton.jit
def gradient_terms(target, m, s, valid, smoothing, z_loss, weight):
    """(shift, slope, flat, hit) of `store_gradient`. A target out of range makes the row NaN: loud, and no sync."""
    in_range = (target >= 0) & (target < valid)
    weight = tl.where(in_range, weight, float("nan"))
    slope = weight * (1.0 + 2.0 * z_loss * (m + tl.log(s))) / s
    return tl.where(m == _NO_MAX, 0.0, m), slope, weight * (smoothing / valid), weight * (1.0 - smoothing)


@triton.jit
def zero_row(grad_ptr, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(grad_ptr + cols, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def cross_entropy_rows(logits, grad, row_loss, row_state, targets, factor_ptr, words,
                       stride, grad_stride, width, valid, ignore_index, factor, smoothing, z_loss,
                       GRAD: tl.constexpr, STATE: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
                       HAS_FACTOR: tl.constexpr, ONE_TILE: tl.constexpr,
                       GROUP: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Loss of one row (GRAD: and its gradient; STATE: and (m, S) for a later one)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_ptr = logits + row * stride
    if target == ignore_index:
        tl.store(row_loss + row, 0.0)
        if GRAD:
            zero_row(grad + row * grad_stride, width, BLOCK)
    else:
        if STATS:
            seen = load_key(words, THREADS)
        in_range = (target >= 0) & (target < valid)
        z_t = tl.load(row_ptr + tl.where(in_range, target, 0)).to(tl.float32)
        anchor = tl.where(tl.abs(z_t) < float("inf"), z_t, 0.0)

        m_g = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
        s_g = tl.zeros([BLOCK // GROUP], tl.float32)
        d_g = tl.zeros([BLOCK // GROUP], tl.float32)
        top_g = tl.full([BLOCK // GROUP], -1, tl.int32)
        whole = 0 if ONE_TILE else valid // BLOCK * BLOCK  # columns in tiles that need no mask
        for start in range(0, whole, BLOCK):
            z, cols = load_tile(row_ptr, start, width, valid, False, "evict_last", BLOCK)
            m_g, s_g, d_g, top_g = absorb_tile(
                z, cols, valid, anchor, m_g, s_g, d_g, top_g, False, SMOOTH, STATS, GROUP, BLOCK)  # fmt: skip
        tail, tail_cols = load_tile(row_ptr, whole, width, valid, True, "evict_last", BLOCK)
        m_g, s_g, d_g, top_g = absorb_tile(
            tail, tail_cols, valid, anchor, m_g, s_g, d_g, top_g, True, SMOOTH, STATS, GROUP, BLOCK)  # fmt: skip

        m = tl.max(m_g, 0)
        s = tl.sum(s_g * tl.exp(m_g - tl.where(m == float("-inf"), 0.0, m)), 0)
        log_s = tl.log(s)
        loss = (1.0 - smoothing) * (m - z_t) + log_s
        if SMOOTH:
            loss += smoothing * (m - anchor - tl.sum(d_g, 0) / valid)
        loss += z_loss * (m + log_s) * (m + log_s) if z_loss != 0.0 else 0.0
        tl.store(row_loss + row, tl.where(in_range, loss, float("nan")))
        if STATE:
            tl.store(row_state + 2 * row, m)
            tl.store(row_state + 2 * row + 1, s)
        if STATS:
            if not in_range:
                tl.atomic_add(words + 5, 1, sem="relaxed")
            record_row(row_ptr, row, width, valid, tl.max(top_g, 0), tl.max(seen, 0), words, THREADS)

        if GRAD:
            weight = factor
            if HAS_FACTOR:
                weight *= tl.load(factor_ptr).to(tl.float32)
            shift, slope, flat, hit = gradient_terms(target, m, s, valid, smoothing, z_loss, weight)
            grad_ptr = grad + row * grad_stride
            # A short row is still in registers; a long one is read again, newest first, out of L1 and L2.
            if not ONE_TILE:
                tail, tail_cols = load_tile(row_ptr, whole, width, valid, True, "evict_first", BLOCK)
            store_gradient(grad_ptr, tail, tail_cols, target, shift, slope, flat, hit, width, valid, True, "evict_first")
            for done in range(0, whole, BLOCK):
                z, cols = load_tile(row_ptr, whole - BLOCK - done, width, valid, False, "evict_first", BLOCK)
                store_gradient(grad_ptr, z, cols, target, shift, slope, flat, hit, width, valid, False, "evict_first")
            if not ONE_TILE:
                zero_row(grad_ptr + whole + BLOCK, width - whole - BLOCK, BLOCK)  # pad columns beyond the tail


@triton.jit
def cross_entropy_gradient(logits, grad, row_state, targets, factor_ptr,
                           stride, grad_stride, width, valid, ignore_index, smoothing, z_loss,
                           BLOCK: tl.constexpr):  # fmt: skip
    """The deferred gradient: one tile a program, from the row state of the forward pass."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    target = tl.load(targets + row)
    grad_ptr = grad + row * grad_stride
    if target == ignore_index:
        cols = start + tl.arange(0, BLOCK)
        tl.store(grad_ptr + cols, tl.zeros([BLOCK], grad.dtype.element_ty), mask=cols < width)
    else:
        m = tl.load(row_state + 2 * row)
        s = tl.load(row_state + 2 * row + 1)
        weight = tl.load(factor_ptr).to(tl.float32)
        shift, slope, flat, hit = gradient_terms(target, m, s, valid, smoothing, z_loss, weight)
        z, cols = load_tile(logits + row * stride, start, width, valid, True, "evict_first", BLOCK)
        store_gradient(grad_ptr, z, cols, target, shift, slope, flat, hit, width, valid, True, "evict_first")


@dataclass(frozen=True)
class Plan:
    """How a launch was made: `one_tile` keeps the row in registers, otherwise it is read twice, once from HBM."""

    kernel: str
    grid: tuple[int, ...]
    block: int
    group: int
    num_warps: int
    registers: int
    one_tile: bool


def plan_rows(rows: int, width: int, element_bytes: int) -> Plan:
    """Two 128-bit loads a thread and tile. With 80 registers a thread, three blocks of 8 warps share an SM."""
    per_thread = 32 // element_bytes
    block = min(_WARPS * 32 * per_thread, max(64, triton.next_power_of_2(width)))
    num_warps = max(1, block // (32 * per_thread))
    return Plan(
        kernel="cross_entropy_rows",
        grid=(rows,),
        block=block,
        group=16 // element_bytes,  # the columns of one 128-bit load
        num_warps=num_warps,
        registers=80 if num_warps == _WARPS else 128,
        one_tile=width <= block,
    )


def plan_gradient(rows: int, width: int) -> Plan:
    block = min(4096, max(64, triton.next_power_of_2(width)))
    return Plan(
        kernel="cross_entropy_gradient",
        grid=(rows, triton.cdiv(width, block)),
        block=block,
        group=1,
        num_warps=max(1, min(8, block // 512)),
        registers=80,
        one_tile=width <= block,
    )


def launch_rows(logits, targets, grad, row_loss, row_state, factor, words, *, ignore_index, smoothing, z_loss, valid) -> Plan:
    """Row losses, and the gradient (`grad`) or the row state, whichever is not None; returns the plan.

    factor: a Python float, or an fp32 device scalar.
    """
    rows, width = logits.shape
    p = plan_rows(rows, width, logits.element_size())
    pointer, number = (None, factor) if isinstance(factor, float) else (factor, 1.0)
    cross_entropy_rows[p.grid](
        logits, grad, row_loss, row_state, targets, pointer, words,
        logits.stride(0), 0 if grad is None else grad.stride(0), width, valid, ignore_index,
        number, smoothing, z_loss,
        GRAD=grad is not None, STATE=row_state is not None, SMOOTH=smoothing != 0, STATS=words is not None,
        HAS_FACTOR=pointer is not None, ONE_TILE=p.one_tile, GROUP=p.group, BLOCK=p.block,
        THREADS=32 * p.num_warps, num_warps=p.num_warps, maxnreg=p.registers,
    )  # fmt: skip
    return p


def launch_gradient(logits, targets, row_state, grad, factor, *, ignore_index, smoothing, z_loss, valid) -> Plan:
    """The deferred gradient times `factor`, an fp32 device scalar; returns the plan."""
    rows, width = logits.shape
    p = plan_gradient(rows, width)
    cross_entropy_gradient[p.grid](
        logits, grad, row_state, targets, factor,
        logits.stride(0), grad.stride(0), width, valid, ignore_index, smoothing, z_loss,
        BLOCK=p.block, num_warps=p.num_warps, maxnreg=p.registers,
    )  # fmt: skip
    return p
