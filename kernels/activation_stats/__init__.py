"""Statistics of module outputs and their gradients, into a ring buffer on the device, without a sync.

For each tensor, into one cell (step, slot) of the ring:

    numel, nan, inf, zeros, fp16_flush, fp16_subnormal, sumsq, absmax     as in multi_tensor_stats
    over_fp16    finite |x| > 65,504: what fp16 would turn into infinity (or round down to its largest value)

One launch serves up to 8 tensors. Addresses travel as kernel arguments, not in a table: an activation lives
elsewhere every step, and a CUDA graph records arguments but would re-read a table that is gone.

The ring's state (enabled, step, record) lives on the device and is advanced by `ring.tick()`, so a captured
graph decides by itself, replay after replay, which steps are measured: on an off step every program reads one
word and returns; nothing is written. A cell written twice in one step (micro-batches) adds up.

Memory traffic of an on step: every tensor read once. Each tensor is cut into at most 64 shares; the program that
finishes a tensor last joins its shares in their order, so the same values give the same bits.

Over_fp16 costs nothing: the kernel of multi_tensor_stats counts 0 < |x| < t anyway, here with t just above 65,504,
and over_fp16 is what remains of numel.

Tried and lost: keeping references to all outputs and measuring them in one launch at the end of the step (holds
every activation alive through backward); a table of addresses (an upload per module, wrong under graph replay).
"""

from importlib import import_module

_LAZY = {
    "activation_stats": "op",
    "ActivationRing": "ring",
    "ActivationReading": "ring",
    "compile_specs": "triton_kernel",
    "bench_arms": "bench_arms",
}


def bytes_moved(numels: list[int], element_bytes: list[int]) -> int:
    """Device-memory bytes of one enabled call: every element read once; 0 when the ring is off."""
    return sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int]) -> int:
    """Floating-point operations: a multiply and an add for each element."""
    return 2 * sum(numels)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
