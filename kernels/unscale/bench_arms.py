"""What `python -m kernels bench` compares for unscale_and_stats_. Scale and clip factor are 1, so that values stay."""

import torch

from kernels.bench import BenchArm
from kernels.multi_tensor_stats.bench_arms import DTYPES, MODELS, five_statistics, tensors
from kernels.multi_tensor_stats.stats import TensorStats
from kernels.unscale import bytes_moved
from kernels.unscale.op import unscale_and_stats_

MAX_NORM = 1e9


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [
        arm
        for model, shapes in MODELS[device].items()
        for dtype in dtypes or ("fp32", "bf16")
        if dtype != "fp16"
        for arm in _case(device, dtype, model, shapes)
    ]


def _case(device, dtype, model, shapes):
    def ours(clip):
        def setup():
            grads, out = tensors(device, dtype, shapes), TensorStats.allocate(len(shapes), device)
            inv_scale = torch.ones((), device=device)
            return lambda: unscale_and_stats_(grads, inv_scale, max_norm=MAX_NORM, clip=clip, out=out)

        return setup

    name = "triton" if device == "cuda" else "torch"
    numels, sizes = [torch.Size(s).numel() for s in shapes], [DTYPES[dtype].itemsize] * len(shapes)
    arms = [
        (f"{name}_clip", ours(True), bytes_moved(numels, sizes, clip=True)),
        (f"{name}_in_place", ours(False), bytes_moved(numels, sizes, clip=False)),
        ("unscale_and_clip_grad_norm", lambda: by_torch(device, dtype, shapes), 0),
        ("eager_with_statistics", lambda: by_torch(device, dtype, shapes, statistics=True), 0),
    ]
    case = f"{dtype} {model} gradients"
    return [BenchArm("unscale", case, arm, setup, size) for arm, setup, size in arms]


def by_torch(device: str, dtype: str, shapes: list[tuple[int, ...]], statistics: bool = False):
    """The kernels of GradScaler.unscale_ and clip_grad_norm_(foreach=True), without their bookkeeping.

    They measure nothing; `statistics` adds what our op reports, in eager torch.
    """
    parameters = [torch.nn.Parameter(x) for x in tensors(device, dtype, shapes)]
    for p in parameters:
        p.grad = p.detach()
    grads = [p.grad for p in parameters]
    found_inf, inv_scale = torch.zeros((), device=device), torch.ones((), device=device)

    def call():
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if statistics:
            five_statistics(grads)
        return torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)

    return call
