"""The learning-rate schedule: linear warm-up, then a cosine to a tenth of the peak."""

from __future__ import annotations

import math

FLOOR = 0.1
"""Where the cosine ends, as a share of the peak."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """The rate of update ``step`` (1 to ``max_steps``). The first warm-up step is not 0."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
