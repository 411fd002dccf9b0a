"""Logit magnitude and overflow counts, accumulated on the device and never synchronised.

What is counted, over the finite and non-finite elements of a (rows, width) matrix:

    absmax, row, col   largest finite |x| and where it is (ties: smallest row, then smallest column)
    nan, pos_inf, neg_inf
    over_fp16          finite elements with |x| > 65,504, which fp16 would turn into infinity

How it is made cheap. |x| orders like the integer made of its fp32 bits without the
sign, and in that order finite < Inf < NaN. So one integer maximum per element (and no
NaN trap: `tl.maximum` on floats drops NaN) tells per row whether *anything* unusual is
there. Only rows whose maximum is beyond 65,504 are counted element by element, and only
rows that beat the accumulator so far are searched for the column. The accumulator is
one 64-bit word, |x| bits above, complement of the flat index below, raised with
`atomic_max`; the counts are integer atomics. All of it is exact and independent of order.

Memory traffic of the standalone pass: x read once. Inside a loss kernel: nothing.
"""

from importlib import import_module

_LAZY = {
    "LogitStats": "accumulator",
    "logit_stats": "op",
    "compile_specs": "triton_kernel",
}


def bytes_moved(rows: int, width: int, element_bytes: int) -> int:
    """Device-memory bytes of the standalone pass: the input, once."""
    return rows * width * element_bytes


def flops(rows: int, width: int) -> int:
    """Integer operations (mask, maximum) of the standalone pass; there is no floating-point work."""
    return 2 * rows * width


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
