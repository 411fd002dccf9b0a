"""Statistics of one tile, a contiguous run of elements of one tensor: what a program does before results are joined.

Triton functions of multi_tensor_stats and activation_stats, and the exact conversions that scale_ uses too. A tile
is read fast in whole rows of 16-byte loads, then carefully (masked, float64, every count) at its end, and carefully
once more as a whole where the fast sum of squares cannot be vouched for. The choice is made on the device.
"""

import triton
import triton.language as tl

from kernels.dispatch import interpreted
from kernels.float_formats import FP16, FP32

# Triton's interpreter truncates where the GPU rounds fp32 to bf16, turns subnormal bf16 into other numbers, and has no
# inline PTX: there these are spelled out in integers, so that all but the instructions themselves is tested.
_INTERPRETED = tl.constexpr(interpreted())
_FLUSH_AT = tl.constexpr(FP16.smallest_subnormal / 2)  # |x| <= this rounds to 0 in fp16
_NORMAL_FROM = tl.constexpr(FP16.smallest_normal - FP16.smallest_subnormal / 2)  # |x| >= this: to a normal fp16
_SMALLEST_NORMAL = tl.constexpr(FP32.smallest_normal)


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
        flushed += _ones(a <= _FLUSH_AT, ROWS, THREADS, VEC)
        tiny += _ones(a < _NORMAL_FROM, ROWS, THREADS, VEC)
        under += _ones(raw < below, ROWS, THREADS, VEC)
        if SCALE:
            raw_zeros += _ones(raw == 0.0, ROWS, THREADS, VEC)
    if STORE:  # the raw values are gone when a tile is read again
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
    zeros = tl.zeros((THREADS,), tl.float32)  # counts are exact in fp32 up to 2^24, a tile is smaller
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


# The fast loop for 16-bit input. At 2 bytes an element and 4.8 TB/s an H200 has 12 instruction slots for each; the plain
# loop needs 15. The bit patterns of |x|, read as fp16, are ordered like the values, for bf16 too (a bf16 pattern that fp16
# would read as NaN compares false, and it is larger than any threshold). So one `set.f16x2` yields two 0/1 results and one
# `add.f16x2` counts them: 8 instructions an element in all. Counts are exact to 2,048 per lane; a tile holds 16.


@triton.jit
def _halves(x):
    """The two fp16 of each int32."""
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _count(acc, a, limit, COMPARE: tl.constexpr):
    """acc + (a COMPARE limit), for the two fp16 in each int32; limit holds one number twice."""
    if _INTERPRETED:
        low, high = _halves(a)
        bound, _ = _halves(tl.zeros_like(a) + limit)
        if COMPARE == "lt":
            hit_low, hit_high = low < bound, high < bound
        elif COMPARE == "le":
            hit_low, hit_high = low <= bound, high <= bound
        else:
            hit_low, hit_high = low == bound, high == bound
        acc_low, acc_high = _halves(acc)
        acc_low = (acc_low + hit_low.to(tl.float16)).to(tl.int16, bitcast=True).to(tl.int32)
        acc_high = (acc_high + hit_high.to(tl.float16)).to(tl.int16, bitcast=True).to(tl.int32)
        return (acc_low & 0xFFFF) | (acc_high << 16)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; set." + COMPARE + ".f16x2.f16x2 t, $2, $3; add.rn.f16x2 $0, $1, t; }",
            "=r,r,r,r",
            [acc, a, limit],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _lanes_total(acc):
    low, high = _halves(acc)
    return tl.sum(low.to(tl.float32) + high.to(tl.float32), 0).to(tl.int32)


@triton.jit
def _add_row(
    at, below_pattern, sumsq, top, zeros, flushed, tiny, under, BF16: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """One 16-byte load per thread into the accumulators."""
    a = tl.load(at + tl.arange(0, THREADS * 4)) & 0x7FFF7FFF
    zeros = _count(zeros, a, 0, "eq")
    if BF16:
        low = (a << 16).to(tl.float32, bitcast=True)
        high = (a & -65536).to(tl.float32, bitcast=True)
        flushed = _count(flushed, a, 0x33003300, "le")  # 2^-25
        tiny = _count(tiny, a, 0x38803880, "lt")  # 2^-14: no bf16 lies in the half ulp of fp16 below it
    else:  # what fp16 holds is not flushed by fp16: flushed stays at zeros
        low, high = _halves(a)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
        tiny = _count(tiny, a, 0x04000400, "lt")
    under = _count(under, a, below_pattern, "lt")
    sumsq += tl.sum(tl.reshape(low * low + high * high, (THREADS, 4)), 1)
    return sumsq, tl.maximum(top, tl.maximum(low, high)), zeros, flushed, tiny, under


@triton.jit
def _fast_packed(p, n, below_pattern, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """As _fast with counts and without scaling. `below_pattern`: the threshold's bits in both halves of an int32."""
    BF16: tl.constexpr = p.dtype.element_ty == tl.bfloat16
    COLS: tl.constexpr = THREADS * 4  # int32 pairs of elements in one row of 16-byte loads
    pairs = p.to(tl.pointer_type(tl.int32), bitcast=True)
    sumsq = tl.zeros((THREADS,), tl.float32)
    top = tl.zeros((COLS,), tl.float32)
    zeros = tl.zeros((COLS,), tl.int32)
    flushed = tl.zeros((COLS,), tl.int32)
    tiny = tl.zeros((COLS,), tl.int32)
    under = tl.zeros((COLS,), tl.int32)
    n = n // 2
    whole = n - n % (ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        block = pairs + tl.multiple_of(start, ROWS * COLS)
        for row in tl.static_range(ROWS):
            sumsq, top, zeros, flushed, tiny, under = _add_row(
                block + row * COLS, below_pattern, sumsq, top, zeros, flushed, tiny, under, BF16, THREADS
            )
    for start in range(whole, n, COLS):
        sumsq, top, zeros, flushed, tiny, under = _add_row(
            pairs + tl.multiple_of(start, COLS), below_pattern, sumsq, top, zeros, flushed, tiny, under, BF16, THREADS
        )
    zeros_total = _lanes_total(zeros)
    flushed_total = _lanes_total(flushed) if BF16 else zeros_total
    return (
        tl.sum(sumsq.to(tl.float64), 0), tl.max(top, 0), zeros_total, flushed_total, _lanes_total(tiny),
        tl.maximum(_lanes_total(under) - zeros_total, 0),
    )  # fmt: skip


@triton.jit
def _careful(p, first, n, inv_scale, below, BLOCK: tl.constexpr, SCALE: tl.constexpr, STORE: tl.constexpr):
    """Elements [first, n): masked, squares in float64, every count. For ends, and for tiles _fast cannot vouch for."""
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
        flushed += (mask & (a <= _FLUSH_AT)).to(tl.int32)
        tiny += (mask & (a < _NORMAL_FROM)).to(tl.int32)
        under += ((raw < below) & (raw != 0.0)).to(tl.int32)
        bad += (mask & ((raw < float("inf")) == 0)).to(tl.int32)
    return (
        tl.sum(sumsq, 0), tl.max(top, 0), tl.sum(nan, 0), tl.sum(inf, 0), tl.sum(zeros, 0),
        tl.sum(flushed, 0), tl.sum(tiny, 0), tl.sum(under, 0), tl.sum(bad, 0),
    )  # fmt: skip


@triton.jit
def tile_stats(
    p, n, inv_scale, below, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr, PACKED: tl.constexpr, below_pattern=0,
):  # fmt: skip
    """All statistics of n elements at p: fast on whole rows, careful on the rest, careful again where fast fails."""
    whole = n - n % (THREADS * VEC)
    if PACKED and COUNTS and not SCALE:
        sumsq, top, zeros, flushed, tiny, under = _fast_packed(p, whole, below_pattern, ROWS, THREADS)
        bad = tl.zeros((), tl.int32)
    else:
        sumsq, top, zeros, flushed, tiny, under, bad = _fast(
            p, whole, inv_scale, below, ROWS, THREADS, VEC, SCALE, STORE, COUNTS
        )
    # A finite sum proves that nothing was NaN or Inf. Squares below 2^-126 lose up to 2^-150 each; above
    # n 2^-126 that is less than a rounding of the sum. (top == 0 alone proves nothing: maxima drop NaN.)
    sound = (sumsq < float("inf")) & ((sumsq >= whole * _SMALLEST_NORMAL) | (top == 0.0))
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


@triton.jit
def tile_stats_of(
    address, start, n, dtype, inv_scale, below, below_bf16, below_fp16,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`tile_stats` of n elements from element `start` of the tensor at `address`, whose dtype is a code of `DTYPE_CODES`.

    FP32, BF16, FP16: which dtypes occur in the launch; code for others is not generated.
    """
    sumsq = tl.zeros((), tl.float64)
    top = tl.zeros((), tl.float32)
    nan = tl.zeros((), tl.int32)
    inf = nan
    zeros = nan
    flushed = nan
    tiny = nan
    under = nan
    bad = nan
    if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = tile_stats(
                p, n, inv_scale, below, ROWS, THREADS, 4, TAIL, SCALE, STORE, COUNTS, False
            )
    if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = tile_stats(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS, PACKED, below_bf16
            )
    if FP16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 2:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = tile_stats(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS, PACKED, below_fp16
            )
    return sumsq, top, nan, inf, zeros, flushed, tiny, under, bad
