"""What `python -m kernels bench` and `check` ask of unscale_and_stats_.

Bench: scale and clip factor are 1, so that values stay. Check: torch's own GradScaler kernel bit for bit, and the norm.
"""

from collections.abc import Iterator

import torch

from kernels.bench import BenchArm, own_name
from kernels.check import Judged, of_bound
from kernels.multi_tensor_stats.bench_arms import CHECKED, five_statistics, over_models, sizes, tensors
from kernels.multi_tensor_stats.reference import TensorStats
from kernels.unscale import bytes_moved, unscale_and_stats_

MAX_NORM = 1e9
INV_SCALES = (2.0**-16, 1 / 30_000)


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return over_models(device, dtypes, _case)


def _case(device: str, dtype: str, model: str, shapes: list[tuple[int, ...]]) -> list[BenchArm]:
    if dtype == "fp16":  # refused, as GradScaler does
        return []

    def ours(clip):
        def setup():
            grads, out = tensors(device, dtype, shapes), TensorStats.allocate(len(shapes), device)
            inv_scale = torch.ones((), device=device)
            return lambda: unscale_and_stats_(grads, inv_scale, max_norm=MAX_NORM, clip=clip, out=out)

        return setup

    name = own_name(device)
    arms = [
        (f"{name}_clip", ours(True), bytes_moved(*sizes(dtype, shapes), clip=True)),
        (f"{name}_in_place", ours(False), bytes_moved(*sizes(dtype, shapes), clip=False)),
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


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    if dtype == torch.float16:  # refused, as GradScaler does
        return
    for inv_scale in INV_SCALES:
        for bad in (None, float("inf")):
            grads = [torch.randn(shape, device=device).to(dtype) for shape in CHECKED[device.type]]
            if bad is not None:
                grads[1].view(-1)[7] = bad
            theirs, found_inf = [g.clone() for g in grads], torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(theirs, found_inf, torch.tensor(inv_scale, device=device))
            out = unscale_and_stats_(grads, torch.tensor(inv_scale, device=device), impl=impl)
            case = f"1/scale {inv_scale:.3g}, {'finite' if bad is None else 'one Inf'}"
            unequal = sum(int((~((g == t) | (g.isnan() & t.isnan()))).sum()) for g, t in zip(grads, theirs, strict=True))
            yield Judged(case, "unscaled gradients", float(unequal), 0.0, "elements that differ")
            yield Judged(case, "found_inf", abs(out.found_inf.item() - found_inf.item()), 0.0, "its distance from torch's")
            if bad is None:
                norm = torch.stack([t.double().norm() for t in theirs]).norm().item()
                yield Judged(case, "norm", *of_bound(torch.tensor([abs(out.total_norm.item() - norm) / norm]), 1e-6))
