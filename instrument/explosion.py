"""When a finite loss counts as a divergence. Torch-free."""

from __future__ import annotations

from collections import deque
from statistics import median

MEDIAN_STEPS, EXPLOSION_FACTOR, EXPLOSION_STEPS = 50, 1.5, 100


class ExplosionDetector:
    """The loss explodes when its rolling median over 50 steps stays above 1.5 times the first loss
    for 100 steps after warm-up."""

    def __init__(self, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._recent: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._first: float | None = None
        self._above = 0

    def exploded(self, step: int, loss: float) -> bool:
        """Take one finite or non-finite loss; True at the step that completes the condition."""
        self._first = loss if self._first is None else self._first
        self._recent.append(loss)
        if step <= self._warmup_steps or len(self._recent) < MEDIAN_STEPS:
            return False
        self._median = median(self._recent)
        self._above = self._above + 1 if self._median > EXPLOSION_FACTOR * self._first else 0
        return self._above >= EXPLOSION_STEPS

    def describe(self) -> str:
        """The condition in words."""
        return (
            f"rolling median loss {self._median:.4g} above {EXPLOSION_FACTOR} times the first loss "
            f"{self._first:.4g} for {EXPLOSION_STEPS} steps"
        )
