"""Ranges read from bits, against float64 arithmetic on every value of the 16-bit dtypes."""

import math

import pytest
import torch

from kernels import float_bits

EVERY_16_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_order_of_every_pattern(dtype):
    x = EVERY_16_BITS.view(dtype)
    for value, bits in zip(x.float(), EVERY_16_BITS.tolist(), strict=True):
        if bits % 7 == 0 or abs(bits) < 40:  # every seventh will do
            pattern = bits & 0x7FFF
            assert float_bits.value_of(pattern, dtype) == abs(value) or math.isnan(value)
            assert float_bits.fp32_bits(pattern, dtype) == value.abs().view(torch.int32) or math.isnan(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "values",
    [[0.0], [-0.0, 0.0], [-3.0, 2.0], [-1.0, -2.0], [2.0**-24, -(2.0**-25)], [math.nan], [-math.inf, 5.0, math.nan, -7.0],
     [65504.0, math.inf], []],
    ids=str,
)  # fmt: skip
def test_finite_range(dtype, values):
    x = torch.tensor(values).to(dtype)
    for y in (x, -x):  # a NaN with either sign
        wide = y.double()
        finite = wide[wide.isfinite()].abs()
        expected = (finite.max().item() if len(finite) else 0.0, wide.isnan().sum(), wide.isinf().sum())
        assert float_bits.finite_range(y) == expected
