"""What `python -m kernels bench` compares for cross_entropy: full forward and backward to the logits."""

import torch
import torch.nn.functional as F

from kernels.bench import BenchArm
from kernels.cross_entropy import bytes_moved
from kernels.cross_entropy.op import cross_entropy
from kernels.logit_stats.accumulator import LogitStats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"cuda": [(8192, v) for v in (4096, 32768, 50304, 128256)], "cpu": [(8, 100), (128, 4096), (512, 8192), (64, 50304)]}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    arms = []
    for rows, width in SHAPES[device]:
        for dtype in dtypes or DTYPES:
            arms += _case(device, dtype, rows, width)
    return arms


def _case(device, dtype, rows, width):
    """Our arms give grad_scale, as a training loop does: fp16 gradients are then made in the forward pass too."""

    def inputs():
        logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
        return logits, torch.randint(0, width, (rows,), device=device)

    def ours(with_stats):
        def setup():
            logits, targets = inputs()
            stats = LogitStats(device) if with_stats else None
            scale = torch.full((), 1.0 / rows, device=device)

            def call():
                loss = cross_entropy(logits, targets, normalizer=rows, grad_scale=scale, stats=stats)
                return torch.autograd.grad(loss, logits)

            return call

        return setup

    def other(make):
        def setup():
            logits, targets = inputs()
            loss_of = make()
            return lambda: torch.autograd.grad(loss_of(logits, targets), logits)

        return setup

    name = "triton" if device == "cuda" else "torch"
    size = bytes_moved(rows, width, DTYPES[dtype].itemsize)
    arms = {
        name: ours(True),
        f"{name}_no_stats": ours(False),
        "eager": other(lambda: eager_loss),
        "eager_normalizer": other(lambda: eager_loss_over_a_step),
    }
    if device == "cuda":
        arms["compile"] = other(lambda: torch.compile(eager_loss, dynamic=False))
        arms["liger"] = other(_liger)
    case = f"{dtype} {rows}x{width}"
    return [BenchArm("cross_entropy", case, arm, setup, size if arm.startswith(name) else 0) for arm, setup in arms.items()]


def eager_loss(logits, targets):
    """fp32 loss math from logits of any dtype: what the fused op is compared with."""
    return F.cross_entropy(logits.float(), targets)


def eager_loss_over_a_step(logits, targets):
    """The same job as our arms do: the divisor is a number of its own, that of a whole accumulation step."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / len(targets)


def _liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy
