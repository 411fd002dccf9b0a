"""Statistics of a whole list of tensors (gradients, parameters, optimizer states) in one pass and one launch.

For each tensor x, and for all of them together:

    sumsq  sum of x_i^2            norm  sqrt(sumsq)          absmax  max |x_i| over finite x_i
    nan, inf                       counts of NaN and of +-Inf
    zeros                          x_i == 0
    fp16_flush                     0 < |x_i| <= 2^-25: fp16 rounds it to 0 (the tie goes to even)
    fp16_subnormal                 2^-25 < |x_i| < 2^-14 - 2^-25: fp16 keeps fewer than 11 bits of it
    below                          0 < |x_i| < t, t = 2^-24 or the caller's
    first_nonfinite_index          of the first tensor of the list with a NaN or an Inf

Memory traffic: every element read once (n x element size), plus 112 bytes of table and partial results for each
piece of 16K elements: 0.2 % of fp32. Arithmetic, counted in sm_90 machine code: 11 instructions an element in fp32,
8 in bf16 and fp16 (packed.py; the plain loop took 15), 3 to 5 without counts. At 4.8 TB/s an H200 has 24 issue
slots for an fp32 element and 12 for a 16-bit one.

How one read suffices. The sum of squares runs in fp32 within a piece; a finite sum proves that the piece holds
no NaN and no Inf, so the fast loop counts neither. Where the sum is not finite, or so small that squares may have
been lost below 2^-126, the piece is read again and done in float64 with every count. That decision is taken on
the device. Pieces are joined in float64 in their order, by whichever program finishes a tensor last (a ticket
counter per tensor, then one for the list): one launch, and the same bits every time.

No GPU has run these kernels yet: they are tested under Triton's interpreter and compiled for every generation
(but for the two PTX instructions of packed.py, which the interpreter spells out). GPU times: unmeasured.

Tried and lost: accumulators as wide as a 16-byte load (168 registers in bf16; folding within the thread first takes
72); integer thresholds in 16-bit halves of a word (6 instructions an element and threshold pair, all on the slower
integer pipe); float atomics (order varies, and every call would have to clear the result first); on the CPU
`vector_norm(inf)`, `isfinite` and boolean sums (host.py), and BLAS dots over a whole piece (1e-5 off in bf16, whose
coarse values round one way; dots of 1,024 are 1e-8 off).
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
