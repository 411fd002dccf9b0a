"""The floating-point formats of the project: two integers and what the top of the exponent means; every limit follows.

Torch-free, so that records, predictions and reports read the limits that the kernels count against. OCP's formats for
8 and 4 bits depart from IEEE 754 in what they spend on Inf and NaN; see `FloatFormat.specials`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    name           the project's: "fp16"
    torch_name     torch's, without "torch.": "float16"; None where torch has no such dtype
    exponent_bits, mantissa_bits   stored bits; a leading 1 is implied
    specials       "ieee": the largest exponent field means Inf and NaN; "nan": only the pattern of all ones is NaN,
                   and there is no Inf; "none": every pattern is a number
    signed         False: no sign bit, no zero and no subnormals either (a scale)
    """

    name: str
    torch_name: str | None
    exponent_bits: int
    mantissa_bits: int
    specials: Literal["ieee", "nan", "none"] = "ieee"
    signed: bool = True

    @property
    def bits(self) -> int:
        """Stored bits (tf32: 19, in a container of 32)."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What the exponent field is larger by than the exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def has_inf(self) -> bool:
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.specials != "none"

    @property
    def max_pattern(self) -> int:
        """The bits of `max`."""
        taken = {"ieee": 2**self.mantissa_bits, "nan": 1, "none": 0}[self.specials]
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - taken

    @property
    def max_exponent(self) -> int:
        """Exponent of `max`."""
        return (self.max_pattern >> self.mantissa_bits) - self.bias

    @property
    def min_exponent(self) -> int:
        """Exponent of `smallest_normal`."""
        return int(self.signed) - self.bias

    @cached_property
    def max(self) -> float:
        """The largest finite number."""
        mantissa = self.max_pattern % 2**self.mantissa_bits
        return math.ldexp(2**self.mantissa_bits + mantissa, self.max_exponent - self.mantissa_bits)

    @cached_property
    def smallest_normal(self) -> float:
        """The smallest positive number with the full mantissa."""
        return math.ldexp(1.0, self.min_exponent)

    @cached_property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; up to half of it rounds to zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def eps(self) -> float:
        """From 1 to the next larger number."""
        return math.ldexp(1.0, -self.mantissa_bits)

    def headroom_bits(self, value: float) -> float | None:
        """log2(max / value): bits from a magnitude to `max`, negative beyond it. None for 0 and for what is no magnitude."""
        return math.log2(self.max / value) if 0 < value < math.inf else None


FP64 = FloatFormat("fp64", "float64", 11, 52)
FP32 = FloatFormat("fp32", "float32", 8, 23)
TF32 = FloatFormat("tf32", None, 8, 10)
BF16 = FloatFormat("bf16", "bfloat16", 8, 7)
FP16 = FloatFormat("fp16", "float16", 5, 10)
E5M2 = FloatFormat("e5m2", "float8_e5m2", 5, 2)
E4M3FN = FloatFormat("e4m3fn", "float8_e4m3fn", 4, 3, "nan")
E2M1 = FloatFormat("e2m1", "float4_e2m1fn_x2", 2, 1, "none")
E8M0 = FloatFormat("e8m0", "float8_e8m0fnu", 8, 0, "nan", signed=False)

FLOAT_FORMATS = {f.name: f for f in (FP64, FP32, TF32, BF16, FP16, E5M2, E4M3FN, E2M1, E8M0)}
_BY_TORCH_NAME = {f.torch_name: f for f in FLOAT_FORMATS.values() if f.torch_name}


def float_format(dtype: object) -> FloatFormat | None:
    """The format of a name ("fp16", "float16", "torch.float16") or of a torch.dtype; None for what is none."""
    name = str(dtype).removeprefix("torch.")
    return FLOAT_FORMATS.get(name) or _BY_TORCH_NAME.get(name)
