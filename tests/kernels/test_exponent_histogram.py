"""exponent_histogram against frexp, on every edge of every bin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import exponent_histogram
from kernels.exponent_histogram import CHUNK, ExponentHistogram
from tests.kernels.truth import DEVICE, DTYPES


def truth(x: torch.Tensor) -> dict:
    """From Python's own frexp, element by element."""
    got = {"zeros": 0, "below_range": 0, "above_range": 0, "nan": 0, "pos_inf": 0, "neg_inf": 0, "bins": [0] * 81}
    for v in x.detach().cpu().double().reshape(-1).tolist():
        k = math.frexp(v)[1] - 1 if math.isfinite(v) and v else None
        if k is None:
            got["zeros" if v == 0 else "nan" if v != v else "pos_inf" if v > 0 else "neg_inf"] += 1
        elif -40 <= k <= 40:
            got["bins"][k + 40] += 1
        else:
            got["below_range" if k < 0 else "above_range"] += 1
    return got


def assert_matches(histogram: ExponentHistogram, *tensors: torch.Tensor) -> None:
    reading, want = histogram.read(), truth(torch.cat([t.reshape(-1).double() for t in tensors]))
    for k in range(-40, 41):
        assert reading.bin(k) == want["bins"][k + 40], f"bin {k}"
    for name in ("zeros", "below_range", "above_range", "nan", "pos_inf", "neg_inf"):
        assert getattr(reading, name) == want[name], name
    assert reading.numel == sum(t.numel() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge(device, dtype):
    powers = torch.tensor([2.0**k for k in range(-149, 128)], dtype=torch.float64)
    x = torch.cat([powers, powers * (1 - 2**-8), powers * (2 - 2**-7), -powers])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, math.inf, 65504.0, 3e-45]).double()])
    x = x.to(dtype).to(device)
    assert_matches(exponent_histogram(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 1009, CHUNK["cpu"] + 1])
def test_every_size(device, dtype, numel):
    x = (torch.randn(numel) * torch.logspace(-12, 6, max(numel, 1))[:numel]).to(dtype).to(device)
    assert_matches(exponent_histogram(x), x)


def test_accumulates_strided_and_mixed_tensors(device):
    tensors = [
        torch.randn(30, 40, device=device)[:, ::3],
        torch.randn(20, 30, device=device).bfloat16().T,
        torch.randn(64, 6, device=device)[:, ::2].half(),
        torch.randn(64, 6, device=device)[:, ::2],
        torch.randn(5001, device=device)[1:],
    ]
    out = ExponentHistogram(device)
    for x in tensors:
        assert exponent_histogram(x, out=out) is out
    assert_matches(out, *tensors)
    out.reset()
    assert out.read().numel == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60), st.sampled_from(DTYPES))
def test_any_values(values, dtype):
    x = torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    assert_matches(exponent_histogram(x), x)


def test_reading(device):
    x = torch.tensor([2.0**-24, 2.0**-15, 2.0**-14, 2.0**-25, 40_000.0, 0.0], device=device)
    reading = exponent_histogram(x).read()
    assert reading.fp16_subnormal == 2 and reading.headroom_bits == 0 and reading.nonfinite == 0
    assert exponent_histogram(x * 4).read().headroom_bits == -2
    assert exponent_histogram(x * 0).read().headroom_bits is None
    with pytest.raises(IndexError, match="exponent 41 is outside"):
        reading.bin(41)


def test_modes_and_misuse(device):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(100, device=device, requires_grad=True)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        assert exponent_histogram(x).read().numel == 100
    assert counter.get_total_flops() == 0
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got int64"):
        exponent_histogram(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="out is on cpu, the first argument on meta"):
        exponent_histogram(torch.ones(2, device="meta"), out=ExponentHistogram("cpu"))


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern(device, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (patterns << 16).view(torch.float32) if dtype == torch.float32 else patterns.to(torch.int16).view(dtype)
    x = x.to(device)
    assert_matches(exponent_histogram(x), x)
