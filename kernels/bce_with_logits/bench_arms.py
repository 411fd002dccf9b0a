"""What `python -m kernels bench` and `check` ask of bce_with_logits.

Bench: full forward and backward to the logits. Check: the formula in float64, and eager torch's error in the same dtype.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.bce_with_logits import bce_with_logits, bytes_moved
from kernels.bce_with_logits.reference import dense_targets
from kernels.bench import BenchArm
from kernels.check import Judged
from kernels.dispatch import DTYPES
from kernels.loss_arms import judge_loss, loss_arms

SHAPES = {"cuda": [(16384, 4272)], "cpu": [(256, 4272), (32, 100)]}
CHECKED = {"cuda": (4096, 4271), "cpu": (16, 301)}
LABELS, CHECKED_LABELS = 8, 5


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [
        arm
        for shape in SHAPES[device]
        for dtype in dtypes or DTYPES
        for sparse in (False, True)
        for arm in _case(device, dtype, *shape, sparse)
    ]


def _case(device: str, dtype: str, rows: int, width: int, sparse: bool) -> list[BenchArm]:
    def inputs():
        logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
        labels = torch.randint(0, width, (rows, LABELS), device=device)
        dense = torch.zeros(rows, width, device=device, dtype=DTYPES[dtype]).scatter_(1, labels, 1.0)
        return logits, labels if sparse else dense, dense

    def ours(logits):
        scale = torch.full((), 1.0 / logits.numel(), device=device)
        return lambda x, targets, stats: bce_with_logits(x, targets, grad_scale=scale, stats=stats)

    b = DTYPES[dtype].itemsize
    size = bytes_moved(rows, width, b, dense_target_bytes=0 if sparse else b, labels_per_row=LABELS if sparse else 0)
    case = f"{dtype} {rows}x{width} {'sparse' if sparse else 'dense'}"
    return loss_arms("bce_with_logits", case, device, inputs, ours, eager_loss, eager_loss_over_a_step, size)


def eager_loss(logits, dense):
    """fp32 loss math from logits of any dtype and dense targets."""
    return F.binary_cross_entropy_with_logits(logits.float(), dense.float())


def eager_loss_over_a_step(logits, dense):
    """What our arms compute: the divisor is a number of its own, that of a whole accumulation step."""
    return F.binary_cross_entropy_with_logits(logits.float(), dense.float(), reduction="sum") / logits.numel()


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = CHECKED[device.type]
    weights = torch.rand(width, device=device) * 3 + 0.5
    for case, reduction, weight, scale in (("mean", "mean", None, None), ("label sum, weighted", "label_sum", weights, None),
                                           ("loss scale 65,536 in the gradient", "mean", None, 65536.0)):  # fmt: skip
        logits = (torch.randn(rows, width, device=device) * 6 - 4).to(dtype)
        labels = torch.randint(-1, width, (rows, CHECKED_LABELS), device=device)
        divisor = rows * width if reduction == "mean" else rows
        factor = (scale or 1.0) / divisor
        exact = _loss_and_gradient(logits.double(), labels, weight, factor)
        eager = _loss_and_gradient(logits.float(), labels, weight, factor)
        leaf = logits.clone().requires_grad_()
        loss = bce_with_logits(leaf, labels, pos_weight=weight, reduction=reduction, impl=impl,
                               grad_scale=None if scale is None else factor)  # fmt: skip
        loss.backward()
        largest = 1.0 if weight is None else weight.max().item()
        yield from judge_loss(case, loss, leaf.grad, exact, eager, divisor, factor * largest, floor=1e-9)


def _loss_and_gradient(logits, labels, weight, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of all losses and `factor` times its gradient, in the dtype of `logits`."""
    z = logits.detach().clone().requires_grad_()
    y = dense_targets(labels, z.shape[1]).to(z.dtype)
    total = F.binary_cross_entropy_with_logits(z, y, pos_weight=None if weight is None else weight.to(z.dtype), reduction="sum")
    (grad,) = torch.autograd.grad(total, z, torch.full_like(total, factor))
    return total.detach().double(), grad
