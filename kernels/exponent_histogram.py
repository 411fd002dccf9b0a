"""Counts of |x| per power of two: the distribution of a tensor's magnitudes. Plain torch: it runs only after a failure.

    bin k          2^k <= |x| < 2^(k+1),  k = -40 ... 40
    zeros          x == 0                         below_range  0 < |x| < 2^-40
    above_range    2^41 <= |x| < Inf              nan, pos_inf, neg_inf

Everything follows from the bits: k is the exponent field of |x| in fp32 (bf16 and fp16 convert exactly, and a
subnormal fp16 is a normal fp32), so there is no logarithm and no rounding at the edges: one shift and mask, then
`bincount`. `histc` of `log2` costs several times as much and misplaces values next to a power of two.
"""

from dataclasses import dataclass

import torch

from kernels.dispatch import check_float
from kernels.float_formats import FP32

LOWEST, HIGHEST = -40, 40
CHUNK = {"cpu": 1 << 17}  # elements that stay in a cache
CHUNK_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class ExponentHistogram:
    """Plain counts. `bins[i]` counts 2^(i-40) <= |x| < 2^(i-39), i = 0 ... 80."""

    bins: tuple[int, ...]
    zeros: int
    below_range: int
    above_range: int
    nan: int
    pos_inf: int
    neg_inf: int


@torch.no_grad()
def exponent_histogram(x: torch.Tensor) -> ExponentHistogram:
    """The counts of x per power of two: fp32, bf16 or fp16 (TypeError for others), any shape and strides. Exact. Waits for
    the device."""
    check_float("exponent_histogram", "x", x)
    x = x.detach().reshape(-1)
    fields = torch.zeros(256, dtype=torch.int64, device=x.device)
    for part in x.split(CHUNK.get(x.device.type, CHUNK_ELSEWHERE)) if x.numel() else ():
        part = part.float() if part.dtype == torch.float16 else part  # subnormal fp16 become normal
        if part.dtype == torch.float32:
            field = (part.view(torch.int32) >> 23) & 0xFF
        else:
            field = (part.view(torch.int16) >> 7) & 0xFF
        fields += torch.bincount(field, minlength=256)
    counts, zeros = fields.tolist(), x.numel() - int(torch.count_nonzero(x))
    first, above = FP32.bias + LOWEST, FP32.bias + HIGHEST + 1
    nan, positive = (int(x.isnan().sum()), int((x == float("inf")).sum())) if counts[255] else (0, 0)
    return ExponentHistogram(
        tuple(counts[first:above]), zeros, sum(counts[:first]) - zeros, sum(counts[above:255]), nan, positive,
        counts[255] - nan - positive,
    )  # fmt: skip
