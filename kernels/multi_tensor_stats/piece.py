"""Statistics of one contiguous run of elements: what a program does before results are joined.

Fast on whole rows of 16-byte loads; careful (masked, float64, every count) on the end, and once more on
everything where the fast sum of squares cannot be vouched for. The choice is made on the device.
"""

import triton
import triton.language as tl

from kernels.dispatch import interpreted
from kernels.multi_tensor_stats.packed import fast_packed

# Triton's interpreter truncates where the GPU rounds fp32 to bf16, and turns subnormal bf16 into other numbers: there,
# by hand and in integers to the end.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(x, like):
    """fp32 x in the dtype of `like`, to nearest, ties to even."""
    if _INTERPRETED and like.dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        quiet = bits | 0x400000  # NaN stays NaN when its low bits go
        return (tl.where(x != x, quiet, nearest) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like.dtype)


@triton.jit
def widened(x):
    """x as fp32, exactly."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _magnitudes(p, offsets, mask, inv_scale, MASKED: tl.constexpr, SCALE: tl.constexpr, STORE: tl.constexpr):
    """|x| as read, and |y| after unscaling and rounding to the dtype, both fp32."""
    x = tl.load(p + offsets, mask=mask, other=0.0) if MASKED else tl.load(p + offsets)
    raw = tl.abs(widened(x))
    if SCALE:
        y = rounded(widened(x) * inv_scale, x)
        if STORE:
            if MASKED:
                tl.store(p + offsets, y, mask=mask)
            else:
                tl.store(p + offsets, y)
        return raw, tl.abs(widened(y))
    return raw, raw


@triton.jit
def _ones(hit, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """How many are true, per thread. A comparison that yields 1.0 and an fp32 add are one instruction each."""
    return _fold(tl.where(hit, 1.0, 0.0), ROWS, THREADS, VEC)


@triton.jit
def _fold(x, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Sum of what one thread holds of a (ROWS, THREADS * VEC) block: no shuffles, and one register per accumulator."""
    return tl.sum(tl.sum(tl.reshape(x, (ROWS, THREADS, VEC)), 2), 0)


@triton.jit
def _add_block(
    block, inv_scale, below, sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad,
    ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS x THREADS x VEC elements into the accumulators of (THREADS,)."""
    offsets = tl.arange(0, ROWS)[:, None] * (THREADS * VEC) + tl.arange(0, THREADS * VEC)[None, :]
    raw, a = _magnitudes(block, offsets, None, inv_scale, False, SCALE, STORE)
    sumsq += _fold(a * a, ROWS, THREADS, VEC)
    top = tl.maximum(top, tl.max(tl.max(tl.reshape(a, (ROWS, THREADS, VEC)), 2), 0))
    if COUNTS:
        zeros += _ones(a == 0.0, ROWS, THREADS, VEC)
        flushed += _ones(a <= 2.0**-25, ROWS, THREADS, VEC)
        tiny += _ones(a < 2.0**-14 - 2.0**-25, ROWS, THREADS, VEC)
        under += _ones(raw < below, ROWS, THREADS, VEC)
        if SCALE:
            raw_zeros += _ones(raw == 0.0, ROWS, THREADS, VEC)
    if STORE:  # the raw values are gone when a piece is read again
        bad += _ones((raw < float("inf")) == 0, ROWS, THREADS, VEC)
    return sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad


@triton.jit
def _fast(
    p, n, inv_scale, below, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """n elements, a multiple of THREADS x VEC: ROWS such rows at a time, then one at a time. VEC elements are 16 bytes."""
    sumsq = tl.zeros((THREADS,), tl.float32)
    top = tl.zeros((THREADS,), tl.float32)
    zeros = tl.zeros((THREADS,), tl.float32)  # counts are exact in fp32 up to 2^24, a piece is smaller
    flushed = tl.zeros((THREADS,), tl.float32)
    tiny = tl.zeros((THREADS,), tl.float32)
    under = tl.zeros((THREADS,), tl.float32)
    raw_zeros = tl.zeros((THREADS,), tl.float32)
    bad = tl.zeros((THREADS,), tl.float32)
    whole = n - n % (ROWS * THREADS * VEC)
    for start in range(0, whole, ROWS * THREADS * VEC):
        sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad = _add_block(
            p + tl.multiple_of(start, ROWS * THREADS * VEC), inv_scale, below,
            sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad, ROWS, THREADS, VEC, SCALE, STORE, COUNTS,
        )  # fmt: skip
    for start in range(whole, n, THREADS * VEC):
        sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad = _add_block(
            p + tl.multiple_of(start, THREADS * VEC), inv_scale, below,
            sumsq, top, zeros, flushed, tiny, under, raw_zeros, bad, 1, THREADS, VEC, SCALE, STORE, COUNTS,
        )  # fmt: skip
    if not SCALE:
        raw_zeros = zeros
    return (
        tl.sum(sumsq.to(tl.float64), 0), tl.max(top, 0),
        tl.sum(zeros, 0).to(tl.int32), tl.sum(flushed, 0).to(tl.int32), tl.sum(tiny, 0).to(tl.int32),
        tl.sum(tl.maximum(under - raw_zeros, 0.0), 0).to(tl.int32), tl.sum(bad, 0).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _careful(p, first, n, inv_scale, below, BLOCK: tl.constexpr, SCALE: tl.constexpr, STORE: tl.constexpr):
    """Elements [first, n): masked, squares in float64, every count. For ends, and for pieces _fast cannot vouch for."""
    lanes = tl.arange(0, BLOCK)
    sumsq = tl.zeros((BLOCK,), tl.float64)
    top = tl.zeros((BLOCK,), tl.float32)
    nan = tl.zeros((BLOCK,), tl.int32)
    inf = tl.zeros((BLOCK,), tl.int32)
    zeros = tl.zeros((BLOCK,), tl.int32)
    flushed = tl.zeros((BLOCK,), tl.int32)
    tiny = tl.zeros((BLOCK,), tl.int32)
    under = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, n, BLOCK):
        offsets = start + lanes
        mask = offsets < n
        raw, a = _magnitudes(p, offsets, mask, inv_scale, True, SCALE, STORE)
        wide = a.to(tl.float64)
        sumsq += wide * wide
        finite = a < float("inf")
        top = tl.maximum(top, tl.where(finite, a, 0.0))
        nan += (a != a).to(tl.int32)
        inf += (a == float("inf")).to(tl.int32)
        zeros += (mask & (a == 0.0)).to(tl.int32)
        flushed += (mask & (a <= 2.0**-25)).to(tl.int32)
        tiny += (mask & (a < 2.0**-14 - 2.0**-25)).to(tl.int32)
        under += ((raw < below) & (raw != 0.0)).to(tl.int32)
        bad += (mask & ((raw < float("inf")) == 0)).to(tl.int32)
    return (
        tl.sum(sumsq, 0), tl.max(top, 0), tl.sum(nan, 0), tl.sum(inf, 0), tl.sum(zeros, 0),
        tl.sum(flushed, 0), tl.sum(tiny, 0), tl.sum(under, 0), tl.sum(bad, 0),
    )  # fmt: skip


@triton.jit
def piece_stats(
    p, n, inv_scale, below, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr, PACKED: tl.constexpr, below_pattern=0,
):  # fmt: skip
    """All statistics of n elements at p: fast on whole rows, careful on the rest, careful again where fast fails."""
    whole = n - n % (THREADS * VEC)
    if PACKED and COUNTS and not SCALE:
        sumsq, top, zeros, flushed, tiny, under = fast_packed(p, whole, below_pattern, ROWS, THREADS)
        bad = tl.zeros((), tl.int32)
    else:
        sumsq, top, zeros, flushed, tiny, under, bad = _fast(
            p, whole, inv_scale, below, ROWS, THREADS, VEC, SCALE, STORE, COUNTS
        )
    # A finite sum proves that nothing was NaN or Inf. Squares below 2^-126 lose up to 2^-150 each; above
    # n 2^-126 that is less than a rounding of the sum. (top == 0 alone proves nothing: maxima drop NaN.)
    sound = (sumsq < float("inf")) & ((sumsq >= whole * 1.1754943508222875e-38) | (top == 0.0))
    nan = tl.zeros((), tl.int32)
    inf = nan
    if STORE:
        tl.debug_barrier()  # the values written above are read again below, by other threads
        if not sound:
            s, t, nan, inf, zeros, flushed, tiny, _u, _b = _careful(p, 0, whole, 1.0, 0.0, TAIL, False, False)
            sumsq = s
            top = t
        first = whole
    else:
        first = tl.where(sound, whole, 0)
        sumsq = tl.where(sound, sumsq, 0.0)
        top = tl.where(sound, top, 0.0)
        zeros = tl.where(sound, zeros, 0)
        flushed = tl.where(sound, flushed, 0)
        tiny = tl.where(sound, tiny, 0)
        under = tl.where(sound, under, 0)
    s, t, n1, i1, z1, f1, t1, u1, b1 = _careful(p, first, n, inv_scale, below, TAIL, SCALE, STORE)
    return (
        sumsq + s, tl.maximum(top, t), nan + n1, inf + i1, zeros + z1,
        flushed + f1, tiny + t1, under + u1, bad + b1,
    )  # fmt: skip
