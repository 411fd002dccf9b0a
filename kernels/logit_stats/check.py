"""What `python -m kernels check` asks of logit_stats: exact counts, and the place of the largest."""

from collections.abc import Iterator

import torch

from kernels.check import Judged, counted, differing, with_special
from kernels.logit_stats.accumulator import LogitStats
from kernels.logit_stats.op import logit_stats

SHAPES = {"cuda": (2048, 50304), "cpu": (12, 1009)}


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    x = (torch.randn(SHAPES[device.type], device=device) * 8).to(dtype)
    for case, values in (("random", x), ("special values", with_special(x.clone()))):
        stats = LogitStats(device)
        logit_stats(values, stats, impl=impl)
        got, want = stats.read(), counted(values)
        want = {"absmax": want["absmax"], "nan": want["nan"], "over_fp16": want["over_fp16"],
                "pos_inf": int((values == float("inf")).sum()), "neg_inf": int((values == -float("inf")).sum())}  # fmt: skip
        yield Judged(case, "counts", *differing(got, want))
        there = values[got["row"], got["col"]].double().abs().item() if got["row"] is not None else float("nan")
        yield Judged(case, "place of the largest", abs(there - want["absmax"]), 0.0, "its distance from the largest")
