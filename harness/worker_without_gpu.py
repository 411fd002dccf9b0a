"""`harness.worker` with bitsandbytes imported as well: only for fork servers on machines without a
GPU, where its import has no CUDA to initialise."""

from __future__ import annotations

from harness import worker  # noqa: F401
from harness.optimizer import OptimizerUnavailable, eight_bit_adamw

try:
    eight_bit_adamw()
except OptimizerUnavailable:
    pass  # its runs will say so
