"""What `python -m kernels bench` compares for bce_with_logits: full forward and backward to the logits."""

import torch
import torch.nn.functional as F

from kernels.bce_with_logits import bytes_moved
from kernels.bce_with_logits.op import bce_with_logits
from kernels.bench import BenchArm
from kernels.logit_stats.accumulator import LogitStats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"cuda": [(16384, 4272)], "cpu": [(256, 4272), (32, 100)]}
LABELS = 8


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    arms = []
    for rows, width in SHAPES[device]:
        for dtype in dtypes or DTYPES:
            for sparse in (False, True):
                arms += _case(device, dtype, rows, width, sparse)
    return arms


def _case(device, dtype, rows, width, sparse):
    def inputs():
        logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
        labels = torch.randint(0, width, (rows, LABELS), device=device)
        dense = torch.zeros(rows, width, device=device, dtype=DTYPES[dtype]).scatter_(1, labels, 1.0)
        return logits, labels, dense

    def ours(with_stats):
        def setup():
            logits, labels, dense = inputs()
            targets = labels if sparse else dense
            stats = LogitStats(device) if with_stats else None
            scale = torch.full((), 1.0 / logits.numel(), device=device)

            def call():
                loss = bce_with_logits(logits, targets, grad_scale=scale, stats=stats)
                return torch.autograd.grad(loss, logits)

            return call

        return setup

    def other(make):
        def setup():
            logits, _, dense = inputs()
            loss_of = make()
            return lambda: torch.autograd.grad(loss_of(logits, dense), logits)

        return setup

    name = "triton" if device == "cuda" else "torch"
    b = DTYPES[dtype].itemsize
    size = bytes_moved(rows, width, b, dense_target_bytes=0 if sparse else b, labels_per_row=LABELS if sparse else 0)
    arms = {
        name: ours(True),
        f"{name}_no_stats": ours(False),
        "eager": other(lambda: eager_loss),
        "eager_normalizer": other(lambda: eager_loss_over_a_step),
    }
    if device == "cuda":
        arms["compile"] = other(lambda: torch.compile(eager_loss, dynamic=False))
    case = f"{dtype} {rows}x{width} {'sparse' if sparse else 'dense'}"
    return [BenchArm("bce_with_logits", case, arm, setup, size if arm.startswith(name) else 0) for arm, setup in arms.items()]


def eager_loss(logits, dense):
    """fp32 loss math from logits of any dtype and dense targets."""
    return F.binary_cross_entropy_with_logits(logits.float(), dense.float())


def eager_loss_over_a_step(logits, dense):
    """The same job as our arms do: the divisor is a number of its own, that of a whole accumulation step."""
    return F.binary_cross_entropy_with_logits(logits.float(), dense.float(), reduction="sum") / logits.numel()
