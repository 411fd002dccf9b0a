"""The losses under torch.compile: no graph break, the eager values, one compilation for all slots of the statistics."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import LogitStats, bce_with_logits, cross_entropy

pytestmark = pytest.mark.slow

KINDS = ["cross_entropy", "dense", "sparse"]


def case(kind, dtype, device):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(6, 40, generator=generator) * 3).to(dtype).to(device)
    if kind == "cross_entropy":
        targets = torch.tensor([0, -100, 3, 39, 7, -100], device=device)
    elif kind == "sparse":
        targets = torch.randint(-1, 40, (6, 3), generator=generator).to(device)
    else:
        targets = (torch.rand(6, 40, generator=generator) < 0.1).to(device)

    def loss_of(weight, stats, **options):
        if kind == "cross_entropy":
            return cross_entropy(weight * 2, targets, stats=stats, **options) * 3
        return bce_with_logits(weight * 2, targets, reduction="label_sum", stats=stats, **options) * 3

    return x, loss_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, scaled, impl",
    [
        (torch.float32, True, "torch"),
        (torch.bfloat16, False, "torch"),
        (torch.float16, False, "torch"),  # its gradient is made in the backward pass
        (torch.float16, True, "triton"),
        (torch.float16, False, "triton"),
    ],
    ids=str,
)
def test_whole_graph_equals_eager(device, kind, dtype, scaled, impl):
    torch._dynamo.reset()
    x, loss_of = case(kind, dtype, device)
    scale = torch.tensor(0.25, device=device) if scaled else None
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    seen, expected = LogitStats(device, slots=12), LogitStats(device, slots=12)
    for _ in range(10):  # beyond the compiler's limit of 8 recompilations
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        options = {"normalizer": 5, "grad_scale": scale, "impl": impl}
        mine, theirs = compiled(a, seen, **options), loss_of(b, expected, **options)
        mine.backward()
        theirs.backward()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.grad, b.grad)
        assert seen.read() == expected.read() and seen.read()["absmax"] > 0
        seen.advance()
        expected.advance()
    assert seen.read_all() == expected.read_all()
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_statistics_or_gradient(device, kind):
    torch._dynamo.reset()
    x, loss_of = case(kind, torch.float16, device)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, None), loss_of(x, None), rtol=1e-6, atol=0)
    leaf = x.clone().requires_grad_()
    compiled(leaf, None).backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_operators_keep_their_word(device):
    """torch's own checks: schema, fake tensors against real ones, autograd registration."""
    logits, targets = torch.randn(4, 20, device=device, requires_grad=True), torch.tensor([1, 2, -100, 0], device=device)
    counters = LogitStats(device).current
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for make_grad in (True, False):
        options = (-100, 0.1, 0.0, 20, "torch")
        arguments = (logits, targets, None, 3.0, None, None, counters, "mean", make_grad, *options)
        torch.library.opcheck(torch.ops.dtype_dynamics_cross_entropy.compiled.default, arguments, test_utils=checks)
        labels = targets[:, None].clamp(min=-1)
        arguments = (logits, labels, None, None, None, 2.0, counters, "mean", make_grad, True, None, "torch")
        torch.library.opcheck(torch.ops.dtype_dynamics_bce.compiled.default, arguments, test_utils=checks)


def test_in_place_breaks_the_graph_and_nothing_else(device):
    torch._dynamo.reset()
    x, loss_of = case("cross_entropy", torch.float32, device)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(loss_of, backend="eager")(a, None, inplace_grad=True).backward()
    loss_of(b, None).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss_of, backend="eager", fullgraph=True)(x.requires_grad_(), None, inplace_grad=True)
