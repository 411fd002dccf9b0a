"""What `python -m kernels bench` and `check` ask of cross_entropy.

Bench: full forward and backward to the logits. Check: the formula in float64, and eager torch's error in the same dtype.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.bench import BenchArm
from kernels.check import Judged
from kernels.cross_entropy import bytes_moved, cross_entropy
from kernels.dispatch import DTYPES
from kernels.loss_arms import judge_loss, loss_arms

SHAPES = {"cuda": [(8192, v) for v in (4096, 32768, 50304, 128256)], "cpu": [(8, 100), (128, 4096), (512, 8192), (64, 50304)]}
CHECKED = {"cuda": (512, 50304), "cpu": (24, 1024)}
CASES = {
    "mean": {},
    "ignored rows, pad columns": {"ignore_index": -100, "valid_vocab": True},
    "label smoothing": {"label_smoothing": 0.1},
    "loss scale 65,536 in the gradient": {"grad_scale": 65536.0},
    "gradient in place": {"inplace_grad": True},
}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [arm for shape in SHAPES[device] for dtype in dtypes or DTYPES for arm in _case(device, dtype, *shape)]


def _case(device: str, dtype: str, rows: int, width: int) -> list[BenchArm]:
    def inputs():
        logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
        targets = torch.randint(0, width, (rows,), device=device)
        return logits, targets, targets

    def ours(logits):
        scale = torch.full((), 1.0 / rows, device=device)
        return lambda x, targets, stats: cross_entropy(x, targets, normalizer=rows, grad_scale=scale, stats=stats)

    case, size = f"{dtype} {rows}x{width}", bytes_moved(rows, width, DTYPES[dtype].itemsize)
    return loss_arms("cross_entropy", case, device, inputs, ours, eager_loss, eager_loss_over_a_step, size, liger=_liger)


def eager_loss(logits, targets):
    """fp32 loss math from logits of any dtype: what the fused op is compared with."""
    return F.cross_entropy(logits.float(), targets)


def eager_loss_over_a_step(logits, targets):
    """What our arms compute: the divisor is a number of its own, that of a whole accumulation step."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / len(targets)


def _liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = CHECKED[device.type]
    for case, options in CASES.items():
        logits = (torch.randn(rows, width, device=device) * 4).to(dtype)
        options, smoothing = dict(options), options.get("label_smoothing", 0.0)
        valid = width - 47 if options.pop("valid_vocab", False) else width
        targets = torch.randint(0, valid, (rows,), device=device)
        if "ignore_index" in options:
            targets[::3] = -100
        count = int((targets != -100).sum())
        if "grad_scale" in options:
            options["grad_scale"] /= count
        factor = options.get("grad_scale", 1.0 / count)
        exact = _loss_and_gradient(logits.double(), targets, valid, smoothing, factor)
        eager = _loss_and_gradient(logits.float(), targets, valid, smoothing, factor)
        leaf = logits.clone().requires_grad_()
        inplace = options.get("inplace_grad", False)
        loss = cross_entropy(leaf * 1 if inplace else leaf, targets, valid_vocab=valid, impl=impl, **options)
        loss.backward()
        yield from judge_loss(case, loss, leaf.grad, exact, eager, count, factor, floor=1e-7)


def _loss_and_gradient(logits, targets, valid, smoothing, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the row losses and `factor` times its gradient, in the dtype of `logits`."""
    z = logits.detach().clone().requires_grad_()
    total = F.cross_entropy(z[:, :valid], targets, label_smoothing=smoothing, reduction="sum")
    (grad,) = torch.autograd.grad(total, z, torch.full_like(total, factor))
    return total.detach().double(), grad
