"""The largest batch that fits, by doubling and bisection: pure, given only whether a batch fits and what it took.

Memory grows with the batch almost in a line, so after two trials a line through their peaks says where the limit should be;
a guess is tried once, between what fitted and what did not, and bisection does the rest. The answer is a batch that did fit,
and the smallest that is known not to lies within `granularity` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FINENESS = 16
"""The limit is found to within a sixteenth to an eighth of the batch: finer differences are the allocator's mood."""


@dataclass(frozen=True)
class BatchTrial:
    """One batch size. ``status``: fits, oom, unsupported, error (``why`` says what), crashed. Rates over the timed steps, null
    in a trial that only asks whether the batch fits. ``peak_bytes``: reserved by the allocator on CUDA; null on a CPU."""

    batch: int
    status: str
    why: str | None = None
    peak_bytes: int | None = None
    step_s: float | None = None
    timed_steps: int = 0
    tokens_per_s: float | None = None
    real_tokens_per_s: float | None = None

    @property
    def fits(self) -> bool:
        return self.status == "fits"


@dataclass(frozen=True)
class Found:
    """``largest`` fits; None: not even one row does. ``fails`` is the smallest that was tried and does not fit; None: the
    search ended at ``most``."""

    largest: int | None
    fails: int | None
    trials: tuple[BatchTrial, ...]


def granularity(batch: int) -> int:
    """Rows to which the limit near ``batch`` is found: the power of two at or below a `FINENESS`-th of it, at least 1."""
    return 1 << max(0, (batch // FINENESS).bit_length() - 1)


def search(try_batch: Callable[[int], BatchTrial], *, start: int, most: int, limit_bytes: int | None = None) -> Found:
    """Find the largest batch from 1 to ``most``. ``limit_bytes``: the memory there is, for guesses."""
    trials: list[BatchTrial] = []

    def fits(batch: int) -> bool:
        trials.append(try_batch(batch))
        return trials[-1].fits

    low, high = _bracket(fits, min(start, most), most)
    if low is None or high is None:
        return Found(low, high, tuple(trials))
    guess = _guess(trials, limit_bytes, low, high)
    while high - low > granularity(low):
        batch, guess = guess or _middle(low, high), None
        low, high = (batch, high) if fits(batch) else (low, batch)
    return Found(low, high, tuple(trials))


def _bracket(fits: Callable[[int], bool], start: int, most: int) -> tuple[int | None, int | None]:
    """(fits, does not): by doubling from ``start`` or halving; None where there is none up to ``most`` or down to 1."""
    if not fits(start):
        high = start
        while high > 1:
            if fits(high // 2):
                return high // 2, high
            high //= 2
        return None, high
    low = start
    while low < most:
        following = min(2 * low, most)
        if not fits(following):
            return low, following
        low = following
    return low, None


def _middle(low: int, high: int) -> int:
    """Between the two, on a multiple of the granularity where one lies there."""
    step = granularity(low)
    middle = (low + high) // 2 // step * step
    return middle if low < middle < high else (low + high) // 2


def _guess(trials: Sequence[BatchTrial], limit_bytes: int | None, low: int, high: int) -> int | None:
    """Where the line through the two largest peaks reaches the limit, rounded down; None where it says nothing."""
    known = sorted((t.batch, t.peak_bytes) for t in trials if t.fits and t.peak_bytes is not None)[-2:]
    if limit_bytes is None or len(known) < 2 or known[1][1] <= known[0][1]:
        return None
    (b0, m0), (b1, m1) = known
    step = granularity(low)
    at = int(b1 + (limit_bytes - m1) * (b1 - b0) / (m1 - m0)) // step * step
    return at if low < at < high else None
