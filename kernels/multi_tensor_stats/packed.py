"""The loop over whole blocks for 16-bit input: thresholds compared two elements at a time.

At 2 bytes an element and 4.8 TB/s an H200 has 12 instruction slots for each; the plain loop needs 15. The bit
patterns of |x|, read as fp16, are ordered like the values, for bf16 too (a bf16 pattern that fp16 would read as
NaN compares false, and it is larger than any threshold). So one `set.f16x2` yields two 0/1 results and one
`add.f16x2` counts them: 8 instructions an element in all. Counts are exact to 2,048 per lane,
a piece holds 16.
"""

import triton
import triton.language as tl

from kernels.dispatch import interpreted

# Triton's interpreter has no inline PTX: there the instruction pair is spelled out, so that all but it is tested.
_INTERPRETED = tl.constexpr(interpreted())


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
def _total(acc):
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
def fast_packed(p, n, below_pattern, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """As _fast with counts and without scaling. `below_pattern`: the threshold's bits in both halves of an int32."""
    BF16: tl.constexpr = p.dtype.element_ty == tl.bfloat16
    COLS: tl.constexpr = THREADS * 4  # int32 words of one row of 16-byte loads
    words = p.to(tl.pointer_type(tl.int32), bitcast=True)
    sumsq = tl.zeros((THREADS,), tl.float32)
    top = tl.zeros((COLS,), tl.float32)
    zeros = tl.zeros((COLS,), tl.int32)
    flushed = tl.zeros((COLS,), tl.int32)
    tiny = tl.zeros((COLS,), tl.int32)
    under = tl.zeros((COLS,), tl.int32)
    n = n // 2
    whole = n - n % (ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        block = words + tl.multiple_of(start, ROWS * COLS)
        for row in tl.static_range(ROWS):
            sumsq, top, zeros, flushed, tiny, under = _add_row(
                block + row * COLS, below_pattern, sumsq, top, zeros, flushed, tiny, under, BF16, THREADS
            )
    for start in range(whole, n, COLS):
        sumsq, top, zeros, flushed, tiny, under = _add_row(
            words + tl.multiple_of(start, COLS), below_pattern, sumsq, top, zeros, flushed, tiny, under, BF16, THREADS
        )
    zeros_total = _total(zeros)
    flushed_total = _total(flushed) if BF16 else zeros_total
    return (
        tl.sum(sumsq.to(tl.float64), 0), tl.max(top, 0), zeros_total, flushed_total, _total(tiny),
        tl.maximum(_total(under) - zeros_total, 0),
    )  # fmt: skip
