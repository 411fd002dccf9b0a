"""Counts of |x| per power of two: the distribution behind headroom.

    bin k          2^k <= |x| < 2^(k+1),  k = -40 ... 40
    zeros          x == 0                         below_range  0 < |x| < 2^-40
    above_range    2^41 <= |x| < Inf              nan, pos_inf, neg_inf
    fp16_subnormal 2^-24 <= |x| < 2^-14, the magnitudes fp16 holds with fewer than 11 bits: bins -24 to -15
                   (multi_tensor_stats counts by what rounding yields instead; they differ within 2^-25)

Everything follows from the bits: k is the exponent field of |x| in fp32 (bf16 and fp16 convert exactly, and a
subnormal fp16 is a normal fp32), so there is no logarithm and no rounding at the edges.

Memory traffic: x read once, 704 bytes of counts added per program. Per element about 8 integer instructions and the
warp-wide histogram of Triton (ballots, no shared-memory conflict however concentrated the values are).
Counts are integer atomics: exact, and independent of order.

CPU: exponent fields by one shift and mask, then `bincount`; `histc` of `log2` costs several times as much and
misplaces values next to a power of two.
"""

from importlib import import_module

_LAZY = {
    "exponent_histogram": "op",
    "ExponentHistogram": "counts",
    "HistogramReading": "counts",
    "compile_specs": "triton_kernel",
    "bench_arms": "bench_arms",
}


def bytes_moved(numel: int, element_bytes: int) -> int:
    """Device-memory bytes: x, once."""
    return numel * element_bytes


def flops(numel: int) -> int:
    """No floating-point operations: the bits are counted."""
    return 0


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
