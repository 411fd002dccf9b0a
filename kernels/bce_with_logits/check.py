"""What `python -m kernels check` asks of bce_with_logits: the formula in float64, and eager torch's error in the same dtype."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.bce_with_logits.op import bce_with_logits
from kernels.bce_with_logits.reference import dense_targets
from kernels.check import Judged, of_bound
from kernels.cross_entropy.check import INTERPRETED_ULP, TINY, ULP

SHAPES = {"cuda": (4096, 4271), "cpu": (16, 301)}
LABELS = 5


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = SHAPES[device.type]
    weights = torch.rand(width, device=device) * 3 + 0.5
    for case, reduction, weight, scale in (("mean", "mean", None, None), ("label sum, weighted", "label_sum", weights, None),
                                           ("loss scale 65,536 in the gradient", "mean", None, 65536.0)):  # fmt: skip
        logits = (torch.randn(rows, width, device=device) * 6 - 4).to(dtype)
        labels = torch.randint(-1, width, (rows, LABELS), device=device)
        divisor = rows * width if reduction == "mean" else rows
        factor = (scale or 1.0) / divisor
        exact_loss, exact = _loss_and_gradient(logits.double(), labels, weight, factor)
        eager_loss, eager = _loss_and_gradient(logits.float(), labels, weight, factor)
        leaf = logits.clone().requires_grad_()
        loss = bce_with_logits(leaf, labels, pos_weight=weight, reduction=reduction, impl=impl,
                               grad_scale=None if scale is None else factor)  # fmt: skip
        loss.backward()
        yield Judged(case, "loss", *of_bound((loss.double() - exact_loss / divisor).abs(),
                                             ((eager_loss - exact_loss) / divisor).abs().item()
                                             + 2.0**-22 * abs(exact_loss.item() / divisor) + 1e-9))  # fmt: skip
        ulp = (INTERPRETED_ULP if device.type == "cpu" else ULP)[dtype]
        largest = 1.0 if weight is None else weight.max().item()
        bound = (eager.to(dtype).double() - exact).abs().max() + ulp * exact.abs() + 2.0**-23 * factor * largest + TINY[dtype]
        yield Judged(case, "gradient", *of_bound((leaf.grad.double() - exact).abs(), bound))


def _loss_and_gradient(logits, labels, weight, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of all losses and `factor` times its gradient, in the dtype of `logits`."""
    z = logits.detach().clone().requires_grad_()
    y = dense_targets(labels, z.shape[1]).to(z.dtype)
    total = F.binary_cross_entropy_with_logits(z, y, pos_weight=None if weight is None else weight.to(z.dtype), reduction="sum")
    (grad,) = torch.autograd.grad(total, z, torch.full_like(total, factor))
    return total.detach().double(), grad
