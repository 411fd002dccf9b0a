"""Statistics of a whole list of tensors (gradients, parameters, optimizer states) in one pass and one launch.

For each tensor x, and for all of them together:

    sumsq  sum of x_i^2            norm  sqrt(sumsq)          absmax  max |x_i| over finite x_i
    nan, inf                       counts of NaN and of +-Inf
    zeros                          x_i == 0
    fp16_flush                     0 < |x_i| <= 2^-25: fp16 rounds it to 0 (the tie goes to even)
    fp16_subnormal                 2^-25 < |x_i| < 2^-14 - 2^-25: fp16 keeps fewer than 11 bits of it
    below                          0 < |x_i| < t, t = 2^-24 or the caller's
    first_nonfinite_index          of the first tensor of the list with a NaN or an Inf

Memory traffic: every element read once (n x element size), plus 76 bytes of partial sums
and 16 bytes of table for each piece of 16K elements: 0.15 % of fp32. Arithmetic: about
11 instructions an element.

How one read suffices. The sum of squares runs in fp32 within a piece; a finite sum proves
that the piece holds no NaN and no Inf, so the fast loop counts neither. Where the sum is
not finite, or so small that squares may have been lost below 2^-126, the piece is read
again and done in float64 with every count. That decision is taken on the device. Pieces
are joined in float64 in their order, by whichever program finishes a tensor last (a ticket
counter per tensor, then one for the list): one launch, and the same bits every time.

Tried and lost: float atomics (order varies, and every call would have to clear the
result first); `vector_norm(inf)`, `isfinite` and boolean sums on the CPU (see host.py).
"""

from importlib import import_module

_LAZY = {
    "multi_tensor_stats": "op",
    "TensorStats": "stats",
    "StatsReading": "stats",
    "Reading": "stats",
    "decode": "stats",
    "compile_specs": "triton_kernel",
    "bench_arms": "bench_arms",
}


def bytes_moved(numels: list[int], element_bytes: list[int]) -> int:
    """Device-memory bytes of one call: every element read once (tables and partial sums left out: 0.15 %)."""
    return sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int]) -> int:
    """Floating-point operations: a multiply and an add for each element; comparisons are not counted."""
    return 2 * sum(numels)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
