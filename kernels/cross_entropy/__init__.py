"""Softmax cross-entropy over rows of logits, with logit statistics and the gradient in one pass.

The maths, for a row z with valid columns j < V, target t, label smoothing e and z-loss weight c:

    m   = max_j z_j                        S = sum_j exp(z_j - m)        lse = m + log S
    loss = (1 - e) (m - z_t) + e (m - mean_j z_j) + log S + c lse^2
    dloss/dz_j = (1 + 2 c lse) exp(z_j - m) / S - (1 - e) [j = t] - e / V

`exp(z_j - m) / S` and not `exp(z_j - lse)`: at fp16's 65,504 an fp32 lse has lost the
digits of log S. mean_j z_j is summed as differences from z_t for the same reason.
Rows whose target is `ignore_index` have loss and gradient 0, whatever they hold.

Memory traffic, counted by hand for T rows of V columns of b bytes: logits read once and
gradient written once from HBM, 2 T V b; the second reading of a row, for the gradient,
finds it in L1 or L2. Forward alone reads T V b; a deferred backward adds 2 T V b.
Extra memory: 20 bytes a row.
"""

from importlib import import_module

_LAZY = {"cross_entropy": "op", "compile_specs": "specs"}

ROW_BYTES = 8 + 4  # target read, row loss written


def bytes_moved(rows: int, width: int, element_bytes: int, mode: str = "fused") -> int:
    """Device-memory bytes. mode: "fused" (loss and gradient), "forward" (loss), "backward" (deferred gradient)."""
    passes = {"fused": 2, "forward": 1, "backward": 2}[mode]
    return passes * rows * width * element_bytes + rows * ROW_BYTES


def flops(rows: int, width: int, mode: str = "fused") -> int:
    """Elementwise floating-point operations (an exponential counts as one). Not model FLOPs, which are matmuls only.

    forward: max, subtract, exp, add. backward: subtract, exp, multiply by 1/S.
    """
    per_element = {"fused": 7, "forward": 4, "backward": 3}[mode]
    return per_element * rows * width


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
