"""What `python -m kernels bench` and `check` ask of logit_stats: its time, exact counts, and the place of the largest."""

from collections.abc import Iterator

import torch

from kernels.bench import BenchArm, own_name
from kernels.check import Judged, counted, differing, with_special
from kernels.dispatch import DTYPES
from kernels.float_formats import FP16
from kernels.logit_stats import LogitStats, bytes_moved, logit_stats

SHAPES = {"cuda": [(8192, 50304)], "cpu": [(128, 50304)]}
CHECKED = {"cuda": (2048, 50304), "cpu": (12, 1009)}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [arm for shape in SHAPES[device] for dtype in dtypes or DTYPES for arm in _case(device, dtype, *shape)]


def _case(device: str, dtype: str, rows: int, width: int) -> list[BenchArm]:
    def logits():
        return torch.randn(rows, width, device=device).to(DTYPES[dtype])

    def ours():
        x, stats = logits(), LogitStats(device)
        return lambda: (stats.reset(), logit_stats(x, stats))

    def eager():
        x = logits()
        return lambda: five_statistics(x)

    case, size = f"{dtype} {rows}x{width}", bytes_moved(rows, width, DTYPES[dtype].itemsize)
    arms = [(own_name(device), ours, size), ("eager", eager, 0)]
    return [BenchArm("logit_stats", case, name, setup, moved) for name, setup, moved in arms]


def five_statistics(x):
    """What one writes without a kernel, synchronisation left out: the same figures but the place."""
    size = x.abs()
    finite = size.isfinite()
    return (
        size.where(finite, 0).amax(),
        x.isnan().sum(),
        (x == torch.inf).sum(),
        (x == -torch.inf).sum(),
        ((size > FP16.max) & finite).sum(),
    )


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    x = (torch.randn(CHECKED[device.type], device=device) * 8).to(dtype)
    for case, values in (("random", x), ("special values", with_special(x.clone()))):
        stats = LogitStats(device)
        logit_stats(values, stats, impl=impl)
        got, want = stats.read(), counted(values)
        want = {"absmax": want["absmax"], "nan": want["nan"], "over_fp16": want["over_fp16"],
                "pos_inf": int((values == float("inf")).sum()), "neg_inf": int((values == -float("inf")).sum())}  # fmt: skip
        yield Judged(case, "counts", *differing(got, want))
        there = values[got["row"], got["col"]].double().abs().item() if got["row"] is not None else float("nan")
        yield Judged(case, "place of the largest", abs(there - want["absmax"]), 0.0, "its distance from the largest")
