"""scale_ against its definition, torch on a CPU and float64, bit for bit: the factor stays fp32."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import scale_, tensor_list
from kernels.check import SPECIAL
from kernels.unscale import reference_scale_
from tests.kernels.truth import DEVICE, DTYPES, IMPLS, assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under Triton's interpreter
FACTORS = (1.0, 1 / 3, 0.999, 1e-5, 2.0**-30, 1e-40, 0.0, math.inf, math.nan)


def a_list(dtype, device):
    """Several tiles, unaligned starts, no elements, strides, gaps, and every bit pattern of the 16-bit dtypes."""
    torch.manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = every.view(dtype) if dtype.itemsize == 2 else torch.randn(2**16) * 10.0 ** torch.randint(-44, 38, (2**16,))
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    parts = [every, special, *(torch.randn(n).to(dtype) for n in (0, 3, 7001, 5001)), torch.randn(30, 50).to(dtype).T]
    parts = [x.to(device) for x in parts]
    return [*parts[:-2], parts[-2][1:], parts[-1], torch.randn(64, 6).to(dtype).to(device)[:, ::2]]


def in_float64(tensors, factor):
    """Products of at most 48 bits are exact; then the two roundings of the definition."""
    return [(x.double() * factor.double()).float().to(x.dtype) for x in tensors]


@pytest.mark.parametrize("number", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_is_the_float64_product(device, dtype, number):
    factor = torch.tensor(number, device=device)
    before = a_list(dtype, device)
    want = in_float64(before, factor)
    by_definition = [x.clone() for x in before]
    reference_scale_(by_definition, factor)
    assert_same_bits(by_definition, want)
    for impl in IMPLS:
        got = a_list(dtype, device)  # a clone would lie elsewhere in memory, and without gaps
        scale_(got, factor, impl=impl)
        assert_same_bits(got, want)
    if number == 1.0:
        assert_same_bits(want, before)


@pytest.mark.parametrize("number", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_it_is_what_foreach_mul_gives(dtype, number):
    factor = torch.tensor(number)
    theirs, definition = a_list(dtype, "cpu"), a_list(dtype, "cpu")
    torch._foreach_mul_(theirs, factor)
    reference_scale_(definition, factor)
    assert_same_bits(definition, theirs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.floats(0, 1, width=32), st.sampled_from(DTYPES))
@example(values=[2.0**-126], number=torch.tensor(1 / 3).item(), dtype=torch.bfloat16)  # ends among bf16's subnormals
@pytest.mark.parametrize("impl", IMPLS)
def test_any_values(impl, values, number, dtype):
    factor, x = torch.tensor(number, device=DEVICE), torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    want = in_float64([x], factor)
    scale_([x], factor, impl=impl)
    assert_same_bits([x], want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_factor_rounded_to_16_bits_would_show(device, impl):
    """What `_foreach_mul_` does on CUDA: a third of the elements move in the last bit, or all become 0."""
    x = torch.randn(10_000, device=device)
    for dtype, number in ((torch.bfloat16, 1 / 3), (torch.float16, 1 / 3), (torch.float16, 2.0**-30)):
        factor, got = torch.tensor(number, device=device), [(x * 1e4).to(dtype)]
        rounded_first = (got[0].float() * factor.to(dtype).float()).to(dtype)
        scale_(got, factor, impl=impl)
        assert (got[0] != rounded_first).float().mean() > 0.25


def test_a_mixed_list_takes_one_launch_and_shares_the_tables_of_the_statistics(device):
    from kernels import multi_tensor_stats

    mixed = [x for dtype in DTYPES for x in a_list(dtype, device)[1:6]]
    factor = torch.tensor([0.7], device=device)
    want = in_float64(mixed, factor[0])
    multi_tensor_stats(mixed, impl="triton")
    start = tensor_list.launches
    scale_(mixed, factor, impl="triton")
    assert tensor_list.launches == start + 1
    assert tensor_list.last_tables.present == (True, True, True) and tensor_list.last_tables.reused == "all"
    assert_same_bits(mixed, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_version_counters_are_bumped(device, impl, dtype):
    x = torch.randn(50, device=device, dtype=dtype)
    w = torch.ones(50, device=device, dtype=dtype, requires_grad=True)
    loss = (x * w).sum()  # saves x
    version = x._version
    scale_([x], torch.tensor(0.5, device=device), impl=impl)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_leaves_that_require_gradients_and_nothing_at_all(device, impl):
    p, factor = torch.ones(5, device=device, requires_grad=True), torch.tensor(0.5, device=device, requires_grad=True)
    scale_([p], factor, impl=impl)
    assert p.grad_fn is None and p.tolist() == [0.5] * 5
    scale_([], factor, impl=impl)


def test_misuse_is_refused():
    x, half = torch.ones(2), torch.tensor(0.5)
    with pytest.raises(TypeError, match="factor must be a one-element float32 tensor, got float"):
        scale_([x], 0.5)
    with pytest.raises(TypeError, match="factor must be a one-element float32 tensor, got bfloat16"):
        scale_([x], half.bfloat16())
    with pytest.raises(ValueError, match="factor must hold one element"):
        scale_([x], torch.ones(2))
    with pytest.raises(ValueError, match="factor is on meta, the first argument on cpu"):
        scale_([x], half.to("meta"))
    with pytest.raises(TypeError, match=r"tensors\[1\] must be float32, bfloat16 or float16, got int64"):
        scale_([x, torch.ones(2, dtype=torch.int64)], half)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_sync_on_cuda():
    tensors, factor = a_list(torch.bfloat16, "cuda")[:5], torch.tensor(0.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale_(tensors, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
