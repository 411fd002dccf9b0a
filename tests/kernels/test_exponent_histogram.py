"""exponent_histogram against frexp, on every edge of every bin."""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import exponent_histogram
from kernels.exponent_histogram import CHUNK
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


def assert_matches(x: torch.Tensor) -> None:
    got, want = exponent_histogram(x), truth(x)
    assert asdict(got) == {**want, "bins": tuple(want["bins"])}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge(device, dtype):
    powers = torch.tensor([2.0**k for k in range(-149, 128)], dtype=torch.float64)
    x = torch.cat([powers, powers * (1 - 2**-8), powers * (2 - 2**-7), -powers])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, math.inf, 65504.0, 3e-45]).double()])
    x = x.to(dtype).to(device)
    assert_matches(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 1009, CHUNK["cpu"] + 1])
def test_every_size(device, dtype, numel):
    x = (torch.randn(numel) * torch.logspace(-12, 6, max(numel, 1))[:numel]).to(dtype).to(device)
    assert_matches(x)


def test_strided_tensors(device):
    for x in (
        torch.randn(30, 40, device=device)[:, ::3],
        torch.randn(20, 30, device=device).bfloat16().T,
        torch.randn(64, 6, device=device)[:, ::2].half(),
        torch.randn(5001, device=device)[1:],
    ):
        assert_matches(x)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60), st.sampled_from(DTYPES))
def test_any_values(values, dtype):
    x = torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    assert_matches(x)


def test_modes_and_misuse(device):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(100, device=device, requires_grad=True)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        assert_matches(x)
    assert counter.get_total_flops() == 0
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got int64"):
        exponent_histogram(torch.ones(2, dtype=torch.int64))


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern(device, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (patterns << 16).view(torch.float32) if dtype == torch.float32 else patterns.to(torch.int16).view(dtype)
    x = x.to(device)
    assert_matches(x)
