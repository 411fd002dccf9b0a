"""Counts of |x| per power of two: the distribution of a tensor's magnitudes. Plain torch: it runs only after a failure.

    bin k          2^k <= |x| < 2^(k+1),  k = -40 ... 40
    zeros          x == 0                         below_range  0 < |x| < 2^-40
    above_range    2^41 <= |x| < Inf              nan, pos_inf, neg_inf
    fp16_subnormal 2^-24 <= |x| < 2^-14, the magnitudes fp16 holds with fewer than 11 bits: bins -24 to -15
                   (multi_tensor_stats counts by what rounding yields instead; they differ within 2^-25)

Everything follows from the bits: k is the exponent field of |x| in fp32 (bf16 and fp16 convert exactly, and a
subnormal fp16 is a normal fp32), so there is no logarithm and no rounding at the edges: one shift and mask, then
`bincount`. `histc` of `log2` costs several times as much and misplaces values next to a power of two.
"""

from dataclasses import dataclass

import torch

from kernels.dispatch import check_float, check_same_device
from kernels.float_formats import FP16, FP32

LOWEST, HIGHEST = -40, 40
ZEROS, BELOW_RANGE, FIRST_BIN = 0, 1, 2
ABOVE_RANGE = FIRST_BIN + HIGHEST - LOWEST + 1
NAN, POS_INF, NEG_INF = ABOVE_RANGE + 1, ABOVE_RANGE + 2, ABOVE_RANGE + 3
COUNTERS = NEG_INF + 1
CHUNK = {"cpu": 1 << 17}  # elements that stay in a cache
CHUNK_ELSEWHERE = 1 << 24


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
        return sum(self.bin(k) for k in range(FP16.min_exponent - FP16.mantissa_bits, FP16.min_exponent))

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
        return FP16.max_exponent - (filled[-1] + LOWEST) if filled and not self.above_range else None


class ExponentHistogram:
    """Counts on `device`, int64 (87,), added to by every call; `reset()` and `read()` (the only sync)."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.counters = torch.zeros(COUNTERS, dtype=torch.int64, device=device)
        self.device = self.counters.device

    def reset(self) -> None:
        """Back to zero, on the device."""
        self.counters.zero_()

    def read(self) -> HistogramReading:
        """Plain numbers; waits for the device."""
        counts = self.counters.tolist()
        return HistogramReading(
            bins=tuple(counts[FIRST_BIN:ABOVE_RANGE]),
            zeros=counts[ZEROS],
            below_range=counts[BELOW_RANGE],
            above_range=counts[ABOVE_RANGE],
            nan=counts[NAN],
            pos_inf=counts[POS_INF],
            neg_inf=counts[NEG_INF],
        )


@torch.no_grad()
def exponent_histogram(x: torch.Tensor, *, out: ExponentHistogram | None = None) -> ExponentHistogram:
    """Add the counts of x per power of two to `out` (default: a new one).

    x    fp32, bf16 or fp16, any shape and strides (one that is not contiguous is copied)
    out  an ExponentHistogram on the same device, added to: several tensors can share one

    TypeError for other dtypes, ValueError for another device. Exact. Waits for the device.
    """
    check_float("exponent_histogram", "x", x)
    out = ExponentHistogram(x.device) if out is None else out
    check_same_device("exponent_histogram", x.device, out=out.counters)
    x, counters = x.detach().reshape(-1), out.counters
    fields = torch.zeros(256, dtype=torch.int64, device=x.device)
    for part in x.split(CHUNK.get(x.device.type, CHUNK_ELSEWHERE)) if x.numel() else ():
        part = part.float() if part.dtype == torch.float16 else part  # subnormal fp16 become normal
        if part.dtype == torch.float32:
            field = (part.view(torch.int32) >> 23) & 0xFF
        else:
            field = (part.view(torch.int16) >> 7) & 0xFF
        fields += torch.bincount(field, minlength=256)
    zeros = x.numel() - torch.count_nonzero(x)
    first, above = FP32.bias + LOWEST, FP32.bias + HIGHEST + 1
    counters[ZEROS] += zeros
    counters[BELOW_RANGE] += fields[:first].sum() - zeros
    counters[FIRST_BIN:ABOVE_RANGE] += fields[first:above]
    counters[ABOVE_RANGE] += fields[above:255].sum()
    if fields[255]:
        nan, positive = x.isnan().sum(), (x == float("inf")).sum()
        counters[NAN] += nan
        counters[POS_INF] += positive
        counters[NEG_INF] += fields[255] - nan - positive
    return out
