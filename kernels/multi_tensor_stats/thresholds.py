"""Thresholds of the counts, exact in every dtype: as fp32 numbers and as bit patterns."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels.multi_tensor_stats import stats as s


@dataclass(frozen=True)
class Limits:
    """|x| < limit exactly where the bits of |x| are below the pattern; in fp32 where |x| is below the float."""

    flush_end: int  # zero or flushed
    normal_from: int  # zero, flushed or subnormal in fp16
    below: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, dtype: torch.dtype, below: float) -> "Limits":
        after_flush = float(np.nextafter(np.float32(s.FP16_FLUSH_AT), np.float32(1)))
        return cls(*(max(0, _pattern(v, dtype)) for v in (after_flush, s.FP16_NORMAL_FROM, below)))


def _pattern(value: float, dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return int(np.float32(_round_up(value, dtype)).view(np.int32))
    return bit_limit(value, dtype)


def _round_up(value: float, dtype: torch.dtype) -> float:
    """Smallest number of `dtype` that is not below `value`: x < value holds for the same x in `dtype`."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    if near.double().item() < value:
        near = torch.nextafter(near, torch.tensor(float("inf"), dtype=dtype))
    return near.item()


@lru_cache(maxsize=64)
def round_up_fp32(value: float) -> float:
    """The threshold t' in fp32 with x < t' exactly where x < value, for x of 32 bits or fewer."""
    return _round_up(value, torch.float32)


def bit_limit(value: float, dtype: torch.dtype) -> int:
    """The bit pattern T of a 16-bit dtype with |x| < value exactly where the bits of |x| are below T."""
    return torch.tensor(_round_up(value, dtype), dtype=dtype).view(torch.int16).item()
