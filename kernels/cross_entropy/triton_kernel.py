"""Triton kernels for cross-entropy. The maths and the traffic are in the package docstring.

`cross_entropy_rows` gives a row to a program. The running maximum and sum are kept per GROUP of
neighbouring columns that sit in one thread, so that the loop over the row has no barrier and
1 + 1/GROUP exponentials per element; the groups meet once, at the end of the row.
"""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES, number_or_tensor
from kernels.logit_stats.triton_kernel import Tiling, abs_bits, counters_on_meta, load_key, on_meta, record_row

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
def cross_entropy_rows(logits, grad, row_loss, targets, factor_ptr, counters,
                       stride, grad_stride, width, valid, ignore_index, factor, smoothing, z_loss,
                       GRAD: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
                       HAS_FACTOR: tl.constexpr, ONE_TILE: tl.constexpr,
                       GROUP: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Loss of one row (GRAD: and its gradient)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_ptr = logits + row * stride
    if target == ignore_index:
        tl.store(row_loss + row, 0.0)
        if GRAD:
            zero_row(grad + row * grad_stride, width, BLOCK)
    else:
        if STATS:
            seen = load_key(counters, THREADS)
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
        if STATS:
            if not in_range:
                tl.atomic_add(counters + 5, 1, sem="relaxed")
            record_row(row_ptr, row, width, valid, tl.max(top_g, 0), tl.max(seen, 0), counters, THREADS)

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


def tiling_of(width: int, element_bytes: int) -> Tiling:
    """Two 128-bit loads a thread and tile. With 80 registers a thread, three blocks of 8 warps share an SM.

    `one_tile`: the row is kept in registers, otherwise it is read twice, once from HBM.
    """
    per_thread = 32 // element_bytes
    block = min(_WARPS * 32 * per_thread, max(64, triton.next_power_of_2(width)))
    num_warps = max(1, block // (32 * per_thread))
    return Tiling(block, num_warps, registers=80 if num_warps == _WARPS else 128, one_tile=width <= block)


def launch(logits, targets, grad, row_loss, factor, counters, *, ignore_index, smoothing, z_loss, valid) -> Tiling:
    """Row losses, and the gradient where `grad` is not None; returns the tiling.

    factor: a Python float, or an fp32 device scalar.
    """
    rows, width = logits.shape
    tiling = tiling_of(width, logits.element_size())
    factor_at, number = number_or_tensor(factor)
    cross_entropy_rows[(rows,)](
        logits, grad, row_loss, targets, factor_at, counters,
        logits.stride(0), 0 if grad is None else grad.stride(0), width, valid, ignore_index,
        number, smoothing, z_loss,
        GRAD=grad is not None, SMOOTH=smoothing != 0, STATS=counters is not None,
        HAS_FACTOR=factor_at is not None, ONE_TILE=tiling.one_tile,
        GROUP=16 // logits.element_size(),  # the columns of one 128-bit load
        **tiling.constants,
    )  # fmt: skip
    return tiling


def compile_specs() -> list[CompileSpec]:
    """8,192 rows, as many valid columns as GPT-2 has tokens; the loss alone, with smoothing, where rows are long."""
    rows, specs = 8192, []
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    losses, factor = torch.empty(rows, device="meta"), torch.empty((), device="meta")
    for name, dtype in DTYPES.items():
        for width in (50304, 8192, 1024):
            logits, label = on_meta(rows, width, dtype), (name, f"{rows}x{width}")
            options = {"ignore_index": -100, "smoothing": 0.0, "z_loss": 0.0, "valid": width - 47}
            specs += as_launched(
                [("cross_entropy_rows", *label)], launch, logits, targets, logits, losses, factor, counters_on_meta(), **options
            )
            if width == 50304:
                options["smoothing"] = 0.1
                specs += as_launched(
                    [("cross_entropy_loss", *label)], launch, logits, targets, None, losses, factor, None, **options
                )
    return specs
