"""unscale_and_stats_ against torch's own GradScaler kernel and clip_grad_norm_, bit for bit where those are exact."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import TensorStats, multi_tensor_stats, tensor_list, unscale_and_stats_
from tests.kernels.truth import DEVICE, IMPLS, assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under Triton's interpreter
POWER, ODD = 2.0**-16, 1 / 30_000


def gradients(device, scale=1e-3):
    torch.manual_seed(0)
    grads = [
        torch.randn(10, 20),
        torch.randn(7001),
        torch.randn(9001).bfloat16(),
        torch.randn(0),
        torch.randn(3).bfloat16(),
        torch.randn(64, 6)[:, ::2],
        torch.randn(30, 50).T,
        torch.randn(5001)[1:],
    ]
    return [(g * scale).to(device) if g.is_contiguous() else (g.to(device).mul_(scale)) for g in grads]


def by_torch(grads, inv_scale, max_norm=None, norm=None):
    """unscale_ and clip_grad_norm_ of torch; `norm` replaces the fp32 norm by a better one."""
    grads = [g.clone() for g in grads]
    found_inf = torch.zeros((), device=grads[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, torch.as_tensor(inv_scale).to(found_inf))
    unclipped = [g.clone() for g in grads]
    if max_norm is not None:
        factor = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.copy_(g.float() * factor)  # _foreach_mul_ on CUDA would round the factor to bf16 first
    return grads, unclipped, found_inf


SAMPLE = [(None, POWER), (None, ODD), (None, 1.0), (math.inf, ODD), (math.nan, POWER)]
REST = [(bad, inv_scale) for bad in (math.inf, math.nan) for inv_scale in (POWER, ODD, 1.0) if (bad, inv_scale) not in SAMPLE]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("bad", "inv_scale"), [*SAMPLE, *(pytest.param(*values, marks=pytest.mark.soak) for values in REST)])
def test_agrees_with_torch(device, impl, clip, inv_scale, bad):
    grads = gradients(device)
    if bad is not None:
        grads[2][7] = bad
    before = [g.clone() for g in grads]
    out = unscale_and_stats_(grads, inv_scale, max_norm=1e-9, clip=clip, impl=impl)
    want, unclipped, found_inf = by_torch(before, inv_scale, 1e-9, out.total_norm)
    assert_same_bits(grads, want if clip else unclipped)
    assert out.found_inf.item() == found_inf.item() == (bad is not None)
    factor = (1e-9 / (out.total_norm.float() + 1e-6)).clamp(max=1.0)
    assert torch.equal(out.clip_factor.isnan(), factor.isnan()) and (bad or out.clip_factor.item() == factor.item())
    assert out.first_nonfinite_index.item() == (-1 if bad is None else 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("inv_scale", [POWER, ODD])
def test_statistics_are_of_the_unscaled_gradients(device, impl, clip, inv_scale):
    grads = gradients(device)
    grads[1][:5] = torch.tensor([0.0, -0.0, 2.0**-24, 2.0**-25, 1e-38])  # below the threshold as backward left them
    before = [g.clone() for g in grads]
    got = unscale_and_stats_(grads, inv_scale, max_norm=1.0, clip=clip, impl=impl).read()
    _, unclipped, _ = by_torch(before, inv_scale)
    want = multi_tensor_stats(unclipped).read()
    raw = multi_tensor_stats(before).read()
    for g, w, r in zip((*got.tensors, got.total), (*want.tensors, want.total), (*raw.tensors, raw.total), strict=True):
        assert g.below == r.below
        assert (g.absmax, g.zeros, g.fp16_flush, g.fp16_subnormal) == (w.absmax, w.zeros, w.fp16_flush, w.fp16_subnormal)
        assert g.norm == pytest.approx(w.norm, rel=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [False, True])
def test_exact_where_torch_is_exact(device, impl, clip):
    """Small integers times powers of two: every sum of squares is exact, and so is torch's norm."""
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (4, 300)]
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad += 3 * 2.0**12
    params[1].grad[:64] = 2.0**14
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    optimizer = torch.optim.SGD(params, lr=0.0)
    scaler.scale(torch.ones((), device=device))
    ours = [p.grad.clone() for p in params]
    out = unscale_and_stats_(ours, torch.tensor(1 / 65536.0, device=device), max_norm=1.0, clip=clip, impl=impl)
    scaler.unscale_(optimizer)
    if clip:
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        assert norm.item() == out.total_norm.float().item()
    assert_same_bits(ours, [p.grad for p in params])
    assert out.found_inf.item() == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_found_inf_is_decided_before_unscaling(device, impl):
    """inv_scale above 1 can overflow a finite gradient: torch does not call that found_inf, the statistics count it."""
    grads = [torch.full((5000,), 2.0**127, device=device), torch.ones(5, device=device)]
    out = unscale_and_stats_(grads, 4.0, impl=impl).read()
    assert not out.found_inf and out.total.inf == 5000 and out.first_nonfinite_index == 0
    grads = [torch.full((5000,), math.inf, device=device)]
    out = unscale_and_stats_(grads, 0.0, impl=impl).read()
    assert out.found_inf and out.total.nan == 5000


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [False, True])
def test_overflowing_and_tiny_squares(device, impl, clip):
    for value in (1e25, 1e-30):
        grads = [torch.full((9000,), value, device=device)]
        out = unscale_and_stats_(grads, POWER, max_norm=1.0, clip=clip, impl=impl).read()
        assert out.total.norm == pytest.approx(math.sqrt(9000) * torch.tensor(value).item() * POWER, rel=1e-6)
        assert out.total.zeros == 0


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=30),
    st.sampled_from([1.0, POWER, ODD, 2.0**-24, 2.0, 1 / 3]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(values=[2.0**-126], inv_scale=1 / 3, clip=False, dtype=torch.bfloat16)  # ends among bf16's subnormals
@pytest.mark.parametrize("impl", IMPLS)
def test_any_values(impl, values, inv_scale, clip, dtype):
    grads = [torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)]
    before = [g.clone() for g in grads]
    out = unscale_and_stats_(grads, inv_scale, max_norm=1.0, clip=clip, impl=impl)
    want, unclipped, found_inf = by_torch(before, inv_scale, 1.0, out.total_norm)
    assert_same_bits(grads, want if clip else unclipped)
    assert out.found_inf.item() == found_inf.item()
    assert out.read().total.below == multi_tensor_stats(before).read().total.below
    assert out.read().total.zeros == multi_tensor_stats(unclipped).read().total.zeros


def test_launches_and_repeats(device):
    grads, out = gradients(device), TensorStats.allocate(8, device)
    start = tensor_list.launches
    unscale_and_stats_(grads, POWER, out=out, impl="triton")
    assert tensor_list.launches == start + 1
    grads = gradients(device)
    first = unscale_and_stats_(grads, POWER, max_norm=1.0, clip=True, out=out, impl="triton").table.clone()
    assert tensor_list.launches == start + 3 and tensor_list.last_tables.present == (True, True, False)
    out.table.fill_(-5)
    unscale_and_stats_(gradients(device), POWER, max_norm=1.0, clip=True, out=out, impl="triton")
    assert torch.equal(out.table, first)


@pytest.mark.parametrize("impl", IMPLS)
def test_version_counters_are_bumped_and_autograd_is_left_alone(device, impl):
    g = torch.randn(50, device=device, requires_grad=True)
    h = (g * 2).detach()
    version = h._version
    unscale_and_stats_([h], POWER, impl=impl)
    assert h._version > version


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradients(device, impl):
    out = unscale_and_stats_([], POWER, out=TensorStats.allocate(0, device), max_norm=1.0, clip=True, impl=impl).read()
    assert out.clip_factor == 1.0 and not out.found_inf and out.total.numel == 0


def test_misuse_is_refused():
    half = torch.ones(2, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"grads\[1\] is float16; a loss scaler unscales fp32 or bf16"):
        unscale_and_stats_([torch.ones(2), half], POWER)
    with pytest.raises(ValueError, match="clip=True needs max_norm"):
        unscale_and_stats_([torch.ones(2)], POWER, clip=True)
    with pytest.raises(ValueError, match="inv_scale must hold one element"):
        unscale_and_stats_([torch.ones(2)], torch.ones(2))
    with pytest.raises(ValueError, match="out holds 3 tensors"):
        unscale_and_stats_([torch.ones(2)], POWER, out=TensorStats.allocate(3, "cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("clip", [False, True])
def test_no_sync_on_cuda(clip):
    grads, inv_scale = gradients("cuda"), torch.tensor(POWER, device="cuda")
    grads = [g for g in grads if g.is_contiguous()]
    out = TensorStats.allocate(len(grads), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        unscale_and_stats_(grads, inv_scale, out=out, max_norm=1.0, clip=clip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
