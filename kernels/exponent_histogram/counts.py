"""The device-side counts of a histogram, and their reading."""

from dataclasses import dataclass

import torch

LOWEST, HIGHEST = -40, 40
ZEROS, BELOW_RANGE, FIRST_BIN = 0, 1, 2
ABOVE_RANGE = FIRST_BIN + HIGHEST - LOWEST + 1
NAN, POS_INF, NEG_INF = ABOVE_RANGE + 1, ABOVE_RANGE + 2, ABOVE_RANGE + 3
WORDS = 128  # 87 in use


@dataclass(frozen=True)
class HistogramReading:
    """Plain counts. `bins[i]` counts 2^(i-40) <= |x| < 2^(i-39), i = 0 ... 80."""

    bins: tuple[int, ...]
    zeros: int
    below_range: int
    above_range: int
    nan: int
    pos_inf: int
    neg_inf: int

    def bin(self, exponent: int) -> int:
        """How many have 2^exponent <= |x| < 2^(exponent + 1); IndexError outside -40 ... 40."""
        if not LOWEST <= exponent <= HIGHEST:
            raise IndexError(f"exponent {exponent} is outside {LOWEST} ... {HIGHEST}")
        return self.bins[exponent - LOWEST]

    @property
    def fp16_subnormal(self) -> int:
        return sum(self.bin(k) for k in range(-24, -14))

    @property
    def nonfinite(self) -> int:
        return self.nan + self.pos_inf + self.neg_inf

    @property
    def numel(self) -> int:
        return sum(self.bins) + self.zeros + self.below_range + self.above_range + self.nonfinite

    @property
    def headroom_bits(self) -> int | None:
        """Doublings that the largest finite value's power of two may still take in fp16 (2^15 is its last);
        negative: beyond fp16; None: nothing finite and nonzero, or a value outside the range of bins."""
        filled = [i for i, count in enumerate(self.bins) if count]
        return 15 - (filled[-1] + LOWEST) if filled and not self.above_range else None


class ExponentHistogram:
    """Counts on `device`, int64 (128,), added to by every call; `reset()` and `read()` (the only sync)."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.words = torch.zeros(WORDS, dtype=torch.int64, device=device)
        self.device = self.words.device

    def reset(self) -> None:
        """Back to zero, on the device."""
        self.words.zero_()

    def read(self) -> HistogramReading:
        """Plain numbers; waits for the device."""
        w = self.words.tolist()
        return HistogramReading(
            bins=tuple(w[FIRST_BIN:ABOVE_RANGE]),
            zeros=w[ZEROS],
            below_range=w[BELOW_RANGE],
            above_range=w[ABOVE_RANGE],
            nan=w[NAN],
            pos_inf=w[POS_INF],
            neg_inf=w[NEG_INF],
        )
