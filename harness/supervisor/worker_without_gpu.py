"""`harness.supervisor.worker` with bitsandbytes imported as well: only for fork servers on machines without a
GPU, where its import has no CUDA to initialise.
"""

from __future__ import annotations

from harness.optimizer import OptimizerUnavailable, eight_bit_adamw
from harness.supervisor import worker  # noqa: F401

try:
    eight_bit_adamw()
except OptimizerUnavailable:
    pass  # its runs will say so
