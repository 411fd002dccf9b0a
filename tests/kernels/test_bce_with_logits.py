"""bce_with_logits: no less accurate than eager torch in the same dtype, judged against float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import LogitStats, bce_with_logits, logit_stats, small_loss
from tests.kernels.truth import DTYPES, IMPLS, ON_CUDA, ULP, assert_no_worse

pytestmark = pytest.mark.slow


def make(rows, width, dtype, device, labels=3, seed=0, scale=4.0):
    """Logits, sparse targets (with filler and repeats) and the same targets dense."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * scale).to(dtype).to(device)
    sparse = torch.randint(-1, width, (rows, labels), generator=generator).to(device)
    index = torch.where(sparse < 0, width, sparse)
    dense = torch.zeros(rows, width + 1, device=device).scatter_(1, index, 1.0)[:, :width].contiguous()
    return logits, sparse, dense


def reference(logits, dense, precision, factor, grad_factor, pos_weight):
    x = logits.to(precision).clone().requires_grad_()
    weight = None if pos_weight is None else pos_weight.to(precision)
    total = F.binary_cross_entropy_with_logits(x, dense.to(precision), pos_weight=weight, reduction="sum")
    if precision == torch.float64:  # by the formula: autograd's sigmoid - 1 loses a confident positive in float64 too
        y, x = dense.double(), x.detach()
        wy = y if weight is None else y * weight
        return (total * factor).item(), grad_factor * ((1 - y) * x.sigmoid() - wy * (-x).sigmoid())
    (grad,) = torch.autograd.grad(total, x, torch.full_like(total, grad_factor))
    return (total * factor).item(), grad.to(logits.dtype)


def check(logits, targets, dense, impl, *, reduction="mean", normalizer=None, grad_scale=None, grad_output=1.0,
          pos_weight=None, inplace=False):  # fmt: skip
    divisor = {"sum": 1, "mean": logits.numel(), "label_sum": logits.shape[0]}[reduction]
    factor = 1.0 / (normalizer or divisor)
    grad_factor = (factor if grad_scale is None else grad_scale) * grad_output
    expected = reference(logits, dense, torch.float64, factor, grad_factor, pos_weight)
    eager = reference(logits, dense, torch.float32, factor, grad_factor, pos_weight)
    leaf = logits.clone().requires_grad_()
    loss = bce_with_logits(
        leaf * 1 if inplace else leaf, targets, pos_weight=pos_weight, reduction=reduction, normalizer=normalizer,
        grad_scale=grad_scale, inplace_grad=inplace, impl=impl,
    )  # fmt: skip
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward(torch.tensor(grad_output, device=loss.device))
    assert_no_worse(loss.item(), leaf.grad, expected, eager, ulp={**ULP, torch.float32: 2.0**-22})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 2), (7, 13), (4, 127), (4, 129), (2, 2047), (2, 4271)])
def test_shapes_dense_and_sparse(device, impl, dtype, rows, width):
    logits, sparse, dense = make(rows, width, dtype, device)
    check(logits, dense, dense, impl)
    check(logits, sparse, dense, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum", "grad_output": 0.37},
        {"reduction": "label_sum", "grad_output": 2.0},
        {"reduction": "label_sum", "normalizer": 40},
        {"normalizer": 1000.0, "grad_scale": 16.0, "grad_output": 0.3},
        {"inplace": True},
        {"inplace": True, "grad_scale": 0.25, "grad_output": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_options(device, impl, dtype, options, weighted):
    logits, sparse, dense = make(6, 53, dtype, device)
    pos_weight = torch.linspace(0.0, 5.0, 53, device=device) if weighted else None
    check(logits, sparse, dense, impl, pos_weight=pos_weight, **options)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_dense_target_dtypes(device, impl, kind):
    logits, _, dense = make(3, 70, torch.float16, device)
    check(logits, dense.to(kind), dense, impl)


def test_soft_targets(device, impl):
    logits, _, dense = make(3, 70, torch.float32, device)
    soft = dense * 0.8 + 0.1
    check(logits, soft, soft, impl)
    check(logits, soft, soft, impl, pos_weight=torch.full((70,), 2.5, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits_take_the_limit(device, impl, dtype):
    inf = torch.inf
    logits = torch.tensor([[inf, -inf, 1.0], [inf, 2.0, 1.0], [3.0, -inf, 1.0]], dtype=dtype, device=device)
    dense = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]], device=device)
    for pos_weight in (None, torch.tensor([2.0, 3.0, 1.0], device=device)):
        for rows, finite in (([0], True), ([1], False), ([2], False)):
            leaf = logits[rows].clone().requires_grad_()
            loss = bce_with_logits(leaf, dense[rows], reduction="sum", pos_weight=pos_weight, impl=impl)
            loss.backward()
            assert loss.isfinite().item() is finite and not loss.isnan()
            assert leaf.grad.isfinite().all()
        weight = 1.0 if pos_weight is None else 3.0
        assert leaf.grad[0, 1] == -weight and leaf.grad[0, 0] > 0


def test_nan_stays_in_its_place(device, impl):
    logits, sparse, dense = make(3, 70, torch.float32, device)
    logits[1, 5] = torch.nan
    leaf = logits.clone().requires_grad_()
    loss = bce_with_logits(leaf, sparse, impl=impl)
    loss.backward()
    assert loss.isnan() and leaf.grad.isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(device, impl, dtype):
    values = [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 88.0, -88.0, 104.0, -104.0, 20.0, -20.0]
    logits = torch.tensor([values, values], dtype=dtype, device=device)
    dense = torch.tensor([[0.0] * len(values), [1.0] * len(values)], device=device)
    check(logits, dense, dense, impl)


def test_small_losses_keep_their_digits(device, impl):
    """A healthy multi-label loss is a sum of log1p(u) for tiny u: log(1 + u) would return 0 for x = -20."""
    logits = torch.full((2, 300), -20.0, device=device)
    dense = torch.zeros(2, 300, device=device)
    check(logits, dense, dense, impl, reduction="sum")


@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_equal_the_standalone_pass(device, impl, inplace):
    logits, sparse, _ = make(5, 3000, torch.float32, device)
    logits[0, 3], logits[2, 2999], logits[4, 1100], logits[4, 7] = torch.nan, torch.inf, -torch.inf, -70000.0
    alone, inside = LogitStats(device), LogitStats(device)
    logit_stats(logits, alone)
    leaf = logits.clone().requires_grad_()
    bce_with_logits(leaf * 1, sparse, stats=inside, inplace_grad=inplace, impl=impl)
    assert inside.read() == alone.read()


def test_padded_rows_keep_their_stride(device, impl):
    padded = torch.randn(4, 64, device=device)
    _, sparse, dense = make(4, 50, torch.float32, device)
    check(padded[:, :50], sparse, dense, impl)
    leaf = padded.clone().requires_grad_()
    bce_with_logits((leaf * 1)[:, :50], dense, inplace_grad=True, impl=impl).backward()
    assert (leaf.grad[:, 50:] == 0).all()


def test_label_sum_keeps_fp16_gradients_that_the_mean_flushes(device, impl):
    """Trap 11: 4,271 labels, 32 documents, logit -6."""
    logits = torch.full((32, 4271), -6.0, dtype=torch.float16, device=device)
    none = torch.full((32, 1), -1, device=device)
    zeros = {}
    for reduction in ("mean", "label_sum"):
        leaf = logits.clone().requires_grad_()
        bce_with_logits(leaf, none, reduction=reduction, impl=impl).backward()
        zeros[reduction] = (leaf.grad == 0).double().mean().item()
    assert zeros == {"mean": 1.0, "label_sum": 0.0}


def test_inplace_second_backward_and_no_grad(device, impl):
    logits, sparse, _ = make(3, 20, torch.bfloat16, device)
    leaf = logits.clone().requires_grad_()
    loss = bce_with_logits(leaf * 1, sparse, inplace_grad=True, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no gradient is wanted"):
        bce_with_logits(leaf * 1, sparse, inplace_grad=True, impl=impl)
    assert bce_with_logits(logits, sparse, impl=impl).isfinite()


def test_label_out_of_range(device):
    logits, sparse, _ = make(3, 20, torch.float32, device)
    sparse[1, 0] = 20
    with pytest.raises(IndexError, match="label 20 in row 1 is out of range"):
        bce_with_logits(logits.cpu(), sparse.cpu(), impl="torch")
    stats = LogitStats(device)
    leaf = logits.clone().requires_grad_()
    loss = bce_with_logits(leaf, sparse, stats=stats, impl="triton")
    loss.backward()
    assert loss.isnan() and leaf.grad[1].isnan().all() and leaf.grad[[0, 2]].isfinite().all()
    with pytest.raises(IndexError, match="1 target"):
        stats.read()


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (TypeError, "float32, bfloat16 or float16", {"logits": torch.zeros(2, 3, dtype=torch.float64)}),
        (ValueError, "shape", {"logits": torch.zeros(3)}),
        (TypeError, "int64", {"targets": torch.zeros(2, 3, dtype=torch.int32)}),
        (ValueError, "dense targets must have shape", {"targets": torch.zeros(2, 4)}),
        (ValueError, "targets must have shape", {"targets": torch.zeros(3, 3)}),
        (ValueError, "pos_weight", {"pos_weight": torch.ones(2)}),
        (ValueError, "reduction", {"reduction": "none"}),
        (ValueError, "normalizer divides a mean", {"reduction": "sum", "normalizer": 3}),
        (ValueError, "positive", {"normalizer": -1}),
        (ValueError, "pos_weight is on meta", {"pos_weight": torch.ones(3, device="meta")}),
    ],
    ids=str,
)
def test_misuse_is_refused(error, match, arguments):
    call = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, 3)} | arguments
    with pytest.raises(error, match=match):
        bce_with_logits(call.pop("logits"), call.pop("targets"), **call)


def test_row_losses_alone_by_either_branch(device):
    from kernels.bce_with_logits import triton_kernel

    logits, sparse, dense = make(2, 100, torch.bfloat16, device)
    want = F.binary_cross_entropy_with_logits(logits.double(), dense.double(), reduction="none").sum(dim=1)
    for targets, is_sparse in ((sparse, True), (dense, False)):
        losses = torch.empty(2, device=device)
        triton_kernel.launch(logits, targets, None, losses, 1.0, None, sparse=is_sparse, pos_weight=None)
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=0)


def test_under_autocast_and_compile(device):
    logits, sparse, _ = make(4, 30, torch.bfloat16, device)
    expected = bce_with_logits(logits, sparse).item()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert bce_with_logits(logits, sparse).item() == expected
    compiled = torch.compile(lambda x: bce_with_logits(x * 1, sparse), backend="eager")
    leaf = logits.clone().requires_grad_()
    loss = compiled(leaf)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6) and leaf.grad.isfinite().all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 140),
    labels=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 5.0, 60.0]),
    seed=st.integers(0, 2**16),
    reduction=st.sampled_from(["mean", "sum", "label_sum"]),
)
def test_any_shape(device, rows, width, labels, dtype, scale, seed, reduction):
    logits, sparse, dense = make(rows, width, dtype, device, labels, seed, scale)
    for impl in IMPLS:
        check(logits, sparse, dense, impl, reduction=reduction)
    with mock.patch.object(small_loss, "SMALL", {}):
        check(logits, sparse, dense, "torch", reduction=reduction)


@pytest.mark.skipif(ON_CUDA, reason="a CPU's route")
@pytest.mark.parametrize(
    "logit, options, eager_node",
    [
        (1.0, {}, True),
        (1.0, {"reduction": "label_sum", "normalizer": 7, "grad_scale": 3.0}, True),
        (1.0, {"grad_scale": 2.0**-70}, False),
        (torch.inf, {}, False),  # eager torch's loss would be NaN
        (1.0, {"inplace_grad": True}, False),
    ],
    ids=str,
)
def test_small_logits_take_eager_torchs_loss(logit, options, eager_node):
    logits, sparse, dense = make(3, 20, torch.float32, "cpu")
    logits[0, 0], dense[0, 0] = logit, 1.0
    loss = bce_with_logits(logits.requires_grad_() * 1, dense, **options)
    assert (type(loss.grad_fn).__name__ != "_FusedLossBackward") is eager_node
