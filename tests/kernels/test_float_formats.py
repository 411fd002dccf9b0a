"""The table of formats against torch.finfo, and against every bit pattern where torch has no finfo; and ranges that are read
from bits, against float64 arithmetic on every value of the 16-bit dtypes.
"""

import itertools
import math

import pytest
import torch

from kernels import float_bits
from kernels.float_formats import E2M1, E4M3FN, E5M2, E8M0, FLOAT_FORMATS, FP16, TF32, float_format

EVERY_16_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)
WITH_FINFO = ("fp64", "fp32", "bf16", "fp16", "e5m2", "e4m3fn")


@pytest.mark.parametrize("name", WITH_FINFO)
def test_limits_are_torchs(name):
    ours, dtype = FLOAT_FORMATS[name], getattr(torch, FLOAT_FORMATS[name].torch_name)
    info = torch.finfo(dtype)
    assert (ours.bits, ours.max, ours.eps, ours.smallest_normal) == (info.bits, info.max, info.eps, info.smallest_normal)
    smallest = torch.tensor([ours.smallest_subnormal, ours.smallest_subnormal / 2], dtype=torch.float64).to(dtype).double()
    assert smallest.tolist() == [ours.smallest_subnormal, 0.0]
    assert float_format(dtype) is float_format(str(dtype)) is float_format(ours.torch_name) is float_format(name) is ours


@pytest.mark.parametrize("name", ["fp16", "bf16", "e5m2", "e4m3fn", "e8m0"])
def test_specials_and_largest_pattern_are_what_torch_decodes(name):
    """All bit patterns of a dtype, decoded by torch."""
    ours = FLOAT_FORMATS[name]
    integer = torch.int16 if ours.bits == 16 else torch.uint8
    patterns = torch.arange(2**ours.bits).to(integer)
    values = patterns.view(getattr(torch, ours.torch_name)).double()
    positive = values[values.isfinite() & (values > 0)]
    assert (positive.max().item(), positive.min().item()) == (ours.max, ours.smallest_subnormal)
    assert (values.isinf().any().item(), values.isnan().any().item()) == (ours.has_inf, ours.has_nan)
    assert values[ours.max_pattern].item() == ours.max
    assert (values < 0).any().item() is ours.signed


def test_e2m1_from_all_its_patterns():
    """sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 of either sign, none special (OCP MX)."""
    values = []
    for high, low, mantissa in itertools.product((0, 1), repeat=3):
        field = 2 * high + low
        values.append((1 + mantissa / 2) * 2.0 ** (field - 1) if field else mantissa / 2)
    assert values == sorted(values) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E2M1.bits, E2M1.max, values[E2M1.max_pattern]) == (4, max(values), max(values))
    assert (E2M1.smallest_subnormal, E2M1.smallest_normal, E2M1.eps) == (values[1], values[2], values[3] - values[2])
    assert not E2M1.has_inf and not E2M1.has_nan and E2M1.signed


def test_e8m0_is_a_scale():
    """A power of two a pattern, 0xFF NaN: no sign, no zero, no Inf."""
    values = [2.0 ** (pattern - 127) for pattern in range(0xFF)]
    assert (E8M0.bits, E8M0.max, E8M0.max_pattern) == (8, values[-1], 0xFE) and E8M0.max == 2.0**127
    assert E8M0.smallest_normal == E8M0.smallest_subnormal == values[0] == 2.0**-127
    assert E8M0.has_nan and not E8M0.has_inf and not E8M0.signed and E8M0.eps == 1.0


def test_the_limits_that_everybody_knows():
    assert (FP16.max, E5M2.max, E4M3FN.max, E2M1.max) == (65_504, 57_344, 448, 6)
    assert (TF32.bits, TF32.eps, TF32.max) == (19, 2.0**-10, (2 - 2.0**-10) * 2.0**127)
    assert (FP16.min_exponent, FP16.max_exponent, FP16.max_pattern) == (-14, 15, 0x7BFF)


def test_headroom_and_what_has_none():
    assert FP16.headroom_bits(65_504 / 8) == 3.0 and FP16.headroom_bits(2 * 65_504) == -1.0
    assert [FP16.headroom_bits(value) for value in (0.0, math.inf, math.nan)] == [None] * 3
    assert [float_format(name) for name in ("int64", "torch.bool", "", None, "8bit")] == [None] * 5


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
