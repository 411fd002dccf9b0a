"""The loss: the library's in fp32, rounded as declared in 16 bits, normalised over the whole step."""

import pytest
import torch
import torch.nn.functional as F

from harness.loss import training_loss
from kernels import LogitStats


def cross_entropy(logits, targets, **options):
    return training_loss(logits, targets, **{"loss": "cross_entropy", "dtype": torch.float32, **options})


def test_fp32_cross_entropy_is_the_librarys_mean_over_real_targets():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    targets[0, :3] = -100
    got = cross_entropy(logits, targets, normalizer=7)
    torch.testing.assert_close(got, F.cross_entropy(logits.view(-1, 11), targets.view(-1)))


def test_pad_columns_of_the_vocabulary_never_matter():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 16, requires_grad=True), torch.randint(0, 10, (6,))
    losses = []
    for filler in (0.0, 1e4, float("inf"), float("nan")):
        filled = torch.cat([logits[:, :10], torch.full((6, 6), filler)], dim=1)
        losses.append(cross_entropy(filled, targets, normalizer=6, valid_vocab=10))
    assert len({loss.item() for loss in losses}) == 1
    (grad,) = torch.autograd.grad(cross_entropy(logits, targets, normalizer=6, valid_vocab=10), logits)
    assert grad[:, 10:].eq(0).all() and grad[:, :10].ne(0).any()


@pytest.mark.parametrize("normalizer", [4 * 9, 4])
def test_bce_sums_over_labels_and_divides_once(normalizer):
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 9), torch.randint(0, 2, (4, 9)).float()
    got = training_loss(logits, targets, loss="bce_with_logits", dtype=torch.float32, normalizer=normalizer)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / normalizer
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_loss_does_not_overflow_in_its_sum(dtype):
    logits = torch.full((8_192, 4), 0.0, dtype=dtype)
    logits[:, 0] = 60.0
    targets = torch.ones(8_192, dtype=torch.long)  # 60 each: the sum is 491,520, far beyond fp16
    got = training_loss(logits, targets, loss="cross_entropy", dtype=dtype, normalizer=8_192)
    assert got.dtype == dtype and got.item() == pytest.approx(60.0, rel=2.0**-7)


def test_a_16_bit_loss_is_rounded_where_declared():
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 10).half(), torch.randint(0, 10, (64,))
    rows = F.cross_entropy(logits, targets, reduction="none")
    assert rows.dtype == torch.float16
    expected = (rows.float().sum() / 64).half()
    got = training_loss(logits, targets, loss="cross_entropy", dtype=torch.float16, normalizer=64)
    assert torch.equal(got, expected)


def test_autocast_logits_are_upcast_before_the_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 10).bfloat16(), torch.randint(0, 10, (64,))
    torch.testing.assert_close(
        cross_entropy(logits, targets, normalizer=64), F.cross_entropy(logits.float(), targets), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_leave_out_ignored_rows_and_pad_columns(dtype):
    logits = torch.tensor([[1.0, -2.0, 99.0], [5.0, 7.0, float("nan")], [-3.0, 2.5, float("inf")]]).to(dtype)
    stats = LogitStats("cpu")
    cross_entropy(logits, torch.tensor([0, -100, 1]), normalizer=2, valid_vocab=2, dtype=dtype, stats=stats)
    found = stats.read()
    assert (found["absmax"], found["nan"], found["pos_inf"], found["neg_inf"]) == (3.0, 0, 0, 0)


def test_the_loss_scale_is_in_the_gradient_before_it_is_rounded():
    """The trap of fused losses: 1/N in fp16 flushes almost every gradient unless the scale comes first."""
    torch.manual_seed(0)
    rows, width, scale = 64, 5_003, torch.tensor(65_536.0)
    logits = torch.randn(rows, width).half().requires_grad_()
    targets = torch.randint(0, width, (rows,))
    loss = cross_entropy(logits, targets, normalizer=32_768, loss_scale=scale)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    (F.cross_entropy(exact, targets, reduction="sum") * (65_536.0 / 32_768)).backward()
    assert (logits.grad == 0).sum() <= (exact.grad.half() == 0).sum() * 1.01 + 5
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2.0**-10, atol=2.0**-24)
    assert loss.item() == pytest.approx(F.cross_entropy(exact, targets, reduction="sum").item() / 32_768, rel=1e-5)


@pytest.mark.parametrize(("loss", "targets"), [("cross_entropy", torch.arange(6) % 4), ("bce_with_logits", torch.eye(6, 4))])
def test_fused_and_eager_losses_agree_to_rounding(loss, targets):
    torch.manual_seed(0)
    fused = torch.randn(6, 4).bfloat16().requires_grad_()
    eager = fused.detach().clone().requires_grad_()
    got = training_loss(fused, targets, loss=loss, dtype=torch.float32, normalizer=6)
    if loss == "cross_entropy":
        expected = F.cross_entropy(eager.float(), targets, reduction="sum") / 6
    else:
        expected = F.binary_cross_entropy_with_logits(eager.float(), targets, reduction="sum") / 6
    got.backward()
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(fused.grad, eager.grad, rtol=2.0**-8, atol=1e-8)
