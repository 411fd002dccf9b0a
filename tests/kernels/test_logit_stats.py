"""logit_stats: exact counts and places, in every implementation, against a definition written with Python floats."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import LogitStats, logit_stats
from kernels.logit_stats.reference import BAD_TARGETS
from tests.kernels.truth import DTYPES, IMPLS

SPECIAL = [0.0, -0.0, 1.0, -2.5, 65504.0, -65504.0, 6e-8, -3e-41, 70000.0, -3e38, math.inf, -math.inf, math.nan]


def by_definition(x: torch.Tensor) -> dict:
    """The seven numbers, one element at a time."""
    out = {"absmax": None, "row": None, "col": None, "nan": 0, "pos_inf": 0, "neg_inf": 0, "over_fp16": 0}
    for row, values in enumerate(x.double().tolist()):
        for col, value in enumerate(values):
            if math.isnan(value):
                out["nan"] += 1
            elif math.isinf(value):
                out["pos_inf" if value > 0 else "neg_inf"] += 1
            else:
                out["over_fp16"] += abs(value) > 65504
                if out["absmax"] is None or abs(value) > out["absmax"]:
                    out |= {"absmax": abs(value), "row": row, "col": col}
    return out


def measure(x, impl):
    stats = LogitStats(x.device)
    logit_stats(x, stats, impl=impl)
    return stats.read()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 17), (7, 1023), (2, 4097)])
def test_counts_and_place_are_exact(device, impl, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 10
    flat = x.view(-1)
    for i, value in enumerate(SPECIAL):
        flat[(i * 7919) % flat.numel()] = value
    x = x.to(dtype)
    assert measure(x.to(device), impl) == by_definition(x)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    rows=st.integers(1, 4),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_values(device, data, rows, width, dtype):
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
    x = torch.tensor([[data.draw(values) for _ in range(width)] for _ in range(rows)], dtype=torch.float32).to(dtype)
    expected = by_definition(x)
    for impl in IMPLS:
        assert measure(x.to(device), impl) == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_first_row_and_column(device, impl):
    x = torch.zeros(6, 40, device=device)
    x[2, 7], x[2, 9], x[4, 1] = 5.0, -5.0, 5.0
    read = measure(x, impl)
    assert (read["absmax"], read["row"], read["col"]) == (5.0, 2, 7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("last", [-math.inf, math.inf, math.nan, 70_000.0])
def test_the_place_beside_a_row_that_is_out_of_range(device, impl, last):
    x = torch.tensor([[1.0, 2.0], [5.0, 3.0], [last, 1.0]], device=device)
    assert measure(x, impl) == by_definition(x.cpu())


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_leading_dimensions(device, impl):
    base = torch.randn(4, 3, 50, device=device)
    for x in (base[:, :, :33], base[:, 1], base.transpose(0, 2), base[0, 0]):
        assert measure(x, impl) == by_definition(x.reshape(-1, x.shape[-1]).cpu())


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_finite_and_nothing_at_all(device, impl):
    assert measure(torch.full((2, 3), math.nan, device=device), impl)["absmax"] is None
    assert measure(torch.empty(0, 3, device=device), impl)["absmax"] is None
    assert measure(torch.empty(3, 0, device=device), impl)["nan"] == 0


def test_accumulates_over_calls_and_ring_keeps_a_window(device):
    stats = LogitStats(device, slots=3)
    for step in range(5):
        if step:
            stats.advance()
        for scale in (1.0, 2.0):
            logit_stats(torch.full((2, 4), scale * (step + 1), device=device), stats)
    assert [slot["absmax"] for slot in stats.read_all()] == [6.0, 8.0, 10.0]
    assert stats.read()["absmax"] == 10.0
    stats.reset()
    assert stats.read()["absmax"] is None and len(stats.read_all()) == 1


def test_a_slot_holds_one_width(device):
    stats = LogitStats(device, slots=2)
    logit_stats(torch.ones(1, 4, device=device), stats)
    with pytest.raises(ValueError, match="width 4, got 5"):
        logit_stats(torch.ones(1, 5, device=device), stats)
    stats.advance()
    logit_stats(torch.ones(1, 5, device=device), stats)


def test_bad_targets_raise_when_read(device):
    stats = LogitStats(device)
    stats.current[BAD_TARGETS] = 2
    with pytest.raises(IndexError, match="2 target"):
        stats.read()


def test_misuse_is_refused(device):
    stats = LogitStats(device)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        logit_stats(torch.ones(2, 2, dtype=torch.float64, device=device), stats)
    with pytest.raises(ValueError, match="impl must be"):
        logit_stats(torch.ones(2, 2, device=device), stats, impl="cuda")
    with pytest.raises(ValueError, match="at least one dimension"):
        logit_stats(torch.ones((), device=device), stats)
    with pytest.raises(ValueError, match="slots"):
        LogitStats(device, slots=0)
    with pytest.raises(ValueError, match="lives on"):
        logit_stats(torch.ones(2, 2, device="meta"), stats, impl="torch")


def test_repeats_bit_for_bit(device):
    x = torch.randn(64, 300, device=device).bfloat16()
    counters = []
    for _ in range(3):
        stats = LogitStats(device)
        logit_stats(x, stats, impl="triton")
        counters.append(stats.counters.clone())
    assert torch.equal(counters[0], counters[1]) and torch.equal(counters[1], counters[2])
