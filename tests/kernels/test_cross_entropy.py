"""cross_entropy: no less accurate than eager torch in the same dtype, judged against float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import LogitStats, cross_entropy, small_loss
from tests.kernels.truth import DTYPES, IMPLS, ON_CUDA, assert_no_worse

pytestmark = pytest.mark.slow


def make(rows, width, dtype, device, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * scale).to(dtype).to(device)
    targets = torch.randint(0, width, (rows,), generator=generator).to(device)
    return logits, targets


def definition(logits, targets, *, factor, grad_factor, ignore_index=-100, smoothing=0.0, z_loss=0.0, valid=None):
    """Loss and gradient in float64, straight from the formula; pad columns get gradient 0."""
    z = logits.double().requires_grad_()
    part = z[:, :valid]
    keep = targets != ignore_index
    logp = part.log_softmax(dim=1)
    safe = targets.where(keep, 0).unsqueeze(1)
    row = -(1 - smoothing) * logp.gather(1, safe).squeeze(1)
    if smoothing:
        row = row - smoothing * logp.mean(dim=1)
    if z_loss:
        row = row + z_loss * part.logsumexp(dim=1).square()
    total = row.where(keep, 0.0).sum()
    (grad,) = torch.autograd.grad(total, z)
    return (total * factor).item(), grad * grad_factor


def eager(logits, targets, *, factor, grad_factor, ignore_index=-100, smoothing=0.0, z_loss=0.0, valid=None):
    """The same in eager torch: fp32 loss math, one rounding of the gradient to the logits' dtype."""
    z = logits.float().clone().requires_grad_()
    part = z[:, :valid]
    total = F.cross_entropy(part, targets, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum")
    if z_loss:
        total = total + z_loss * part.logsumexp(dim=1).square()[targets != ignore_index].sum()
    (grad,) = torch.autograd.grad(total, z, torch.full_like(total, grad_factor))
    return (total * factor).item(), grad.to(logits.dtype)


def check(logits, targets, impl, *, grad_output=1.0, normalizer=None, reduction="mean", grad_scale=None, inplace=False,
          stats=None, **options):  # fmt: skip
    keep = targets != options.get("ignore_index", -100)
    factor = 1.0 if reduction == "sum" else 1.0 / (normalizer or max(1, int(keep.sum())))
    grad_factor = (factor if grad_scale is None else grad_scale) * grad_output
    expected = definition(logits, targets, factor=factor, grad_factor=grad_factor, **options)
    reference = eager(logits, targets, factor=factor, grad_factor=grad_factor, **options)
    names = {"smoothing": "label_smoothing", "valid": "valid_vocab"}
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(
        leaf * 1 if inplace else leaf, targets, reduction=reduction, normalizer=normalizer, grad_scale=grad_scale,
        inplace_grad=inplace, impl=impl, stats=stats, **{names.get(k, k): v for k, v in options.items()},
    )  # fmt: skip
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward(torch.tensor(grad_output, device=loss.device))
    assert_no_worse(loss.item(), leaf.grad, expected, reference, grad_factor, floor=1e-7)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 2), (7, 13), (5, 63), (5, 64), (5, 65), (2, 4095), (2, 8193)])
def test_shapes(device, impl, dtype, rows, width):
    check(*make(rows, width, dtype, device), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": 0.1},
        {"smoothing": 1.0},
        {"z_loss": 1e-3},
        {"smoothing": 0.2, "z_loss": 1e-2, "grad_output": 3.0},
        {"reduction": "sum", "grad_output": 0.37},
        {"normalizer": 100, "grad_output": -2.0},
        {"normalizer": 12.0, "grad_scale": 4.0, "grad_output": 0.3},
        {"valid": 41, "smoothing": 0.1},
        {"inplace": True},
        {"inplace": True, "grad_scale": 0.25, "grad_output": 2.0},
    ],
    ids=str,
)
def test_options(device, impl, dtype, options):
    logits, targets = make(9, 57, dtype, device)
    targets %= 41
    targets[[1, 4]] = -100
    check(logits, targets, impl, **options)


@pytest.mark.parametrize("width", [50_257, 128_256])
def test_real_vocabularies(device, impl, width):
    check(*make(2, width, torch.bfloat16, device), impl)


def test_padded_vocabulary_takes_no_part(device, impl):
    logits, targets = make(4, 9000, torch.float32, device)
    logits[:, 8197:] = 1e30
    targets %= 8197
    stats = LogitStats(device)
    grad = check(logits, targets, impl, valid=8197, stats=stats)
    assert (grad[:, 8197:] == 0).all()
    assert stats.read()["absmax"] == logits[:, :8197].abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_offsets_keep_the_digits_of_log_s(device, impl, dtype):
    """At +-65,504 an fp32 log-sum-exp has lost log S; the formula must not need it."""
    logits, targets = make(4, 33, dtype, device, scale=1.0)
    for offset in (60000.0, -60000.0):
        check((logits.float() + offset).to(dtype), targets, impl, smoothing=0.1)
    logits[0, 0], logits[0, 1], targets[0] = 65504.0, -65504.0, 1
    check(logits, targets, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [37, 8200])
def test_special_values(device, impl, dtype, width):
    """-Inf masks a column; +Inf, NaN and a row of -Inf make the row NaN, as in eager torch; others are untouched."""
    logits, targets = make(6, width, dtype, device)
    targets[:] = torch.arange(6, device=device)
    logits[0, width - 1] = -torch.inf
    logits[1, width - 2] = torch.inf
    logits[2, 20] = torch.nan
    logits[3] = -torch.inf
    logits[4, :7] = -0.0
    logits[5, 30] = 2.0**-24
    leaf = logits.clone().requires_grad_()
    stats = LogitStats(device)
    loss = cross_entropy(leaf, targets, reduction="sum", stats=stats, impl=impl)
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[[1, 2, 3]].isnan().all(dim=1).tolist() == [True, True, True]
    good = torch.tensor([0, 4, 5], device=device)
    expected = definition(logits[good], targets[good], factor=1.0, grad_factor=1.0)
    reference = eager(logits[good], targets[good], factor=1.0, grad_factor=1.0)
    assert_no_worse(expected[0], leaf.grad[good], expected, reference, weight=1.0)
    read = stats.read()
    assert (read["nan"], read["pos_inf"], read["neg_inf"]) == (1, 1, width + 1)


def test_ignored_rows_may_hold_anything(device, impl):
    logits, targets = make(5, 70, torch.float16, device)
    logits[1], logits[3], targets[1], targets[3] = torch.nan, torch.inf, -100, -100
    stats = LogitStats(device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, stats=stats, impl=impl)
    loss.backward()
    assert loss.isfinite() and (leaf.grad[[1, 3]] == 0).all() and leaf.grad.isfinite().all()
    read = stats.read()
    assert read["nan"] == read["pos_inf"] == 0
    assert read["absmax"] == logits[[0, 2, 4]].float().abs().max().item()


def test_all_ignored(device, impl):
    logits, _ = make(3, 11, torch.float32, device)
    targets = torch.full((3,), -100, device=device)
    for normalizer, loss_is in ((None, "nan"), (10, "0.0")):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, normalizer=normalizer, impl=impl)
        loss.backward()
        assert str(loss.item()) == loss_is and (leaf.grad == 0).all()
    assert cross_entropy(logits[:0], targets[:0], reduction="sum", impl=impl).item() == 0.0


def test_fp16_gradients_survive_the_loss_scale(device, impl):
    """Trap 11: V = 50,257, N = 32,768, scale 65,536. No more zeros than eager under the same scale."""
    logits, targets = make(2, 50_257, torch.float16, device, scale=2.0)
    n, scale = 32_768, 65_536.0
    exact = definition(logits, targets, factor=1 / n, grad_factor=scale / n)[1]
    theirs = eager(logits, targets, factor=1 / n, grad_factor=scale / n)[1]
    by_argument = logits.clone().requires_grad_()
    device_scale = torch.tensor(scale / n, device=device)
    cross_entropy(by_argument, targets, normalizer=n, grad_scale=device_scale, impl=impl).backward()
    by_scaler = logits.clone().requires_grad_()
    (cross_entropy(by_scaler, targets, normalizer=n, impl=impl) * scale).backward()
    for grad in (by_argument.grad, by_scaler.grad):
        assert (grad == 0).sum() <= (theirs == 0).sum()
        assert ((grad.double() - exact).abs() <= 2.0**-10 * exact.abs() + 2.0**-24).all()


@pytest.mark.parametrize("kind", ["float", "0-dim", "1-element int"])
def test_normalizer_and_scale_as_device_scalars(device, impl, kind):
    n = {"float": 7.0, "0-dim": torch.tensor(7.0, device=device), "1-element int": torch.tensor([7], device=device)}[kind]
    logits, targets = make(4, 30, torch.bfloat16, device)
    loss = cross_entropy(logits, targets, normalizer=n, impl=impl)
    exact = definition(logits, targets, factor=1 / 7, grad_factor=1.0)[0]
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_strided_rows(device, impl):
    wide, targets = make(5, 100, torch.float32, device)
    for logits in (wide[:, :48], wide[:, 3:51], wide[:, ::2], wide.t().contiguous().t()):
        check(logits.detach(), targets % logits.shape[1], impl)


@pytest.mark.parametrize("grad_scale", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inplace_gradient(device, impl, grad_scale, dtype):
    logits, targets = make(4, 40, dtype, device)
    weight = logits.clone().requires_grad_()
    output = weight * 1
    loss = cross_entropy(output, targets, inplace_grad=True, grad_scale=grad_scale, impl=impl)
    version = output._version
    loss.backward(retain_graph=True)
    assert output._version > 0 and (version > 0) == (dtype != torch.float16 or grad_scale is not None)
    assert torch.equal(output, weight.grad)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_inplace_gradient_never_hides_from_autograd(device, impl):
    """A capped head saves its output: reading gradients in its place would be a silent error."""
    logits, targets = make(4, 40, torch.float32, device)
    capped = 30 * torch.tanh(logits.requires_grad_() / 30)
    capped = capped.exp()  # saves its own result
    loss = cross_entropy(capped, targets, inplace_grad=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward(device, impl):
    """A gradient made in the forward pass exists once; small logits on a CPU keep eager torch's freedom."""
    logits, targets = make(3, 20, torch.bfloat16, device)
    loss = cross_entropy(logits.requires_grad_(), targets, impl=impl)
    loss.backward(retain_graph=True)
    if impl == "torch" and small_loss.SMALL and not ON_CUDA:
        first = logits.grad.clone()
        loss.backward()
        return torch.testing.assert_close(logits.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.skipif(ON_CUDA, reason="a CPU's route")
@pytest.mark.parametrize(
    "options, eager_node",
    [
        ({}, True),
        ({"normalizer": 7, "grad_scale": 3.0}, True),
        ({"grad_scale": 2.0**70}, False),  # the loss could not be divided out again
        ({"normalizer": torch.tensor(0.0)}, False),
        ({"z_loss": 1e-3}, False),
        ({"inplace_grad": True}, False),
    ],
    ids=str,
)
def test_small_logits_take_eager_torchs_loss(options, eager_node):
    """The test above that claims a route must prove it: by the node that autograd holds."""
    logits, targets = make(3, 20, torch.float32, "cpu")
    loss = cross_entropy(logits.requires_grad_() * 1, targets, **options)
    assert (type(loss.grad_fn).__name__ != "_FusedLossBackward") is eager_node


def test_without_gradient(device, impl):
    logits, targets = make(3, 20, torch.bfloat16, device)
    expected = definition(logits, targets, factor=1 / 3, grad_factor=1.0)[0]
    before = logits.clone()
    assert cross_entropy(logits, targets, impl=impl).item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        assert cross_entropy(logits.requires_grad_(), targets, impl=impl).item() == pytest.approx(expected, rel=1e-6)
        with pytest.raises(RuntimeError, match="no gradient is wanted"):
            cross_entropy(logits, targets, inplace_grad=True, impl=impl)
    assert torch.equal(before, logits)


def test_target_out_of_range(device):
    logits, targets = make(3, 20, torch.float32, device)
    targets[1] = 20
    with pytest.raises(IndexError, match="target 20 in row 1 is out of range"):
        cross_entropy(logits.cpu(), targets.cpu(), impl="torch")
    stats = LogitStats(device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, stats=stats, impl="triton")
    loss.backward()
    assert loss.isnan() and leaf.grad[1].isnan().all() and leaf.grad[[0, 2]].isfinite().all()
    with pytest.raises(IndexError, match="1 target"):
        stats.read()


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (TypeError, "float32, bfloat16 or float16", {"logits": torch.zeros(2, 3, dtype=torch.float64)}),
        (ValueError, "shape", {"logits": torch.zeros(2, 3, 4)}),
        (TypeError, "int64", {"targets": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "targets must have shape", {"targets": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "label_smoothing", {"label_smoothing": 1.5}),
        (ValueError, "reduction", {"reduction": "none"}),
        (ValueError, "normalizer divides a mean", {"reduction": "sum", "normalizer": 3}),
        (ValueError, "positive", {"normalizer": 0}),
        (ValueError, "valid_vocab", {"valid_vocab": 4}),
        (ValueError, "one element", {"grad_scale": torch.zeros(2)}),
        (ValueError, "grad_scale is on meta", {"grad_scale": torch.zeros((), device="meta")}),
        (ValueError, "impl", {"impl": "fast"}),
    ],
    ids=str,
)
def test_misuse_is_refused(error, match, arguments):
    call = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.int64)} | arguments
    with pytest.raises(error, match=match):
        cross_entropy(call.pop("logits"), call.pop("targets"), **call)


def test_the_tiling_says_which_branch_ran(device):
    from kernels.cross_entropy import triton_kernel

    for width, one_tile in ((64, True), (20_000, False)):
        logits, targets = make(2, width, torch.bfloat16, device)
        losses = torch.empty(2, device=device)
        tiling = triton_kernel.launch(
            logits, targets, torch.empty_like(logits), losses, 1.0, None,
            ignore_index=-100, smoothing=0.0, z_loss=0.0, valid=width,
        )  # fmt: skip
        assert tiling.one_tile == one_tile and losses.isfinite().all()


def test_repeats_bit_for_bit(device, impl):
    logits, targets = make(40, 300, torch.bfloat16, device)
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, impl=impl)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_under_autocast_and_compile(device):
    logits, targets = make(4, 30, torch.bfloat16, device)
    expected = cross_entropy(logits, targets).item()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert cross_entropy(logits, targets).item() == expected
    compiled = torch.compile(lambda x: cross_entropy(x * 1, targets), backend="eager")
    leaf = logits.clone().requires_grad_()
    loss = compiled(leaf)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6) and leaf.grad.isfinite().all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    scale=st.sampled_from([0.1, 5.0, 100.0]),
    seed=st.integers(0, 2**16),
    ignored=st.integers(0, 5),
)
def test_any_shape_and_option(device, rows, width, dtype, smoothing, z_loss, scale, seed, ignored):
    logits, targets = make(rows, width, dtype, device, seed, scale)
    if ignored < rows - 1:
        targets[ignored] = -100
    for impl in IMPLS:
        check(logits, targets, impl, smoothing=smoothing, z_loss=z_loss)
    with mock.patch.object(small_loss, "SMALL", {}):
        check(logits, targets, "torch", smoothing=smoothing, z_loss=z_loss)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [31, 50_257, 50_304, 128_256, 262_144])
def test_soak_widths(device, dtype, width):
    for impl in IMPLS:
        check(*make(8 if ON_CUDA else 2, width, dtype, device), impl, smoothing=0.1, z_loss=1e-3)


@pytest.mark.skipif(not ON_CUDA, reason="memory is measured on a GPU")
def test_in_place_needs_one_percent(device):
    logits = torch.randn(2048, 50_304, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 50_304, (2048,), device=device)
    output = logits * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = cross_entropy(output, targets, inplace_grad=True, stats=LogitStats(device))
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * output.numel() * 2
    del loss


@pytest.mark.skipif(not ON_CUDA, reason="synchronisation exists on a GPU only")
def test_never_syncs(device):
    logits, targets = make(64, 50_304, torch.bfloat16, device)
    stats, leaf = LogitStats(device, slots=4), logits.requires_grad_()
    cross_entropy(leaf, targets, stats=stats).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats.advance()
        cross_entropy(leaf, targets, stats=stats).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_model_flops_count_matmuls_only(device, impl):
    """Under the counter the op runs, and adds what torch's own loss adds: nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    logits, targets = make(3, 20, torch.bfloat16, device)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(logits.requires_grad_(), targets, stats=LogitStats(device), impl=impl).backward()
    assert counter.get_total_flops() == 0
    counted = torch.ops.dtype_dynamics_cross_entropy.rows in counter.get_flop_counts()["Global"]
    assert counted
