"""What `python -m kernels bench` compares for logit_stats."""

import torch

from kernels.bench import BenchArm
from kernels.logit_stats import bytes_moved
from kernels.logit_stats.accumulator import LogitStats
from kernels.logit_stats.op import logit_stats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"cuda": [(8192, 50304)], "cpu": [(128, 50304)]}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    arms = []
    for rows, width in SHAPES[device]:
        for dtype in dtypes or DTYPES:
            arms += _case(device, dtype, rows, width)
    return arms


def _case(device, dtype, rows, width):
    def logits():
        return torch.randn(rows, width, device=device).to(DTYPES[dtype])

    def ours():
        x, stats = logits(), LogitStats(device)
        return lambda: (stats.reset(), logit_stats(x, stats))

    def eager():
        x = logits()
        return lambda: five_statistics(x)

    case = f"{dtype} {rows}x{width}"
    size = bytes_moved(rows, width, DTYPES[dtype].itemsize)
    name = "triton" if device == "cuda" else "torch"
    return [BenchArm("logit_stats", case, name, ours, size), BenchArm("logit_stats", case, "eager", eager, 0)]


def five_statistics(x):
    """What one writes without a kernel, synchronisation left out: the same figures but the place."""
    size = x.abs()
    finite = size.isfinite()
    return (
        size.where(finite, 0).amax(),
        x.isnan().sum(),
        (x == torch.inf).sum(),
        (x == -torch.inf).sum(),
        ((size > 65504) & finite).sum(),
    )
