"""What `python -m kernels check` asks of exponent_histogram: every bin, by numpy's frexp in float64."""

from collections.abc import Iterator

import numpy as np
import torch

from kernels.check import Judged, with_special
from kernels.exponent_histogram.counts import HIGHEST, LOWEST
from kernels.exponent_histogram.op import exponent_histogram

ELEMENTS = {"cuda": 20_000_003, "cpu": 5_003}


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    x = torch.randn(ELEMENTS[device.type], device=device)
    x = with_special((x * torch.exp2(torch.randint(-30, 15, x.shape, device=device))).to(dtype))
    got = exponent_histogram(x, impl=impl).read()
    a = x.cpu().double().numpy()
    exponents = np.frexp(np.abs(a[np.isfinite(a) & (a != 0)]))[1] - 1
    places = np.clip(exponents - LOWEST + 1, 0, HIGHEST - LOWEST + 2)  # 0: below the first bin
    bins = [int(n) for n in np.bincount(places, minlength=HIGHEST - LOWEST + 3)]
    want = (bins[0], *bins[1:-1], bins[-1], int((a == 0).sum()), int(np.isnan(a).sum()), int(np.isposinf(a).sum()),
            int(np.isneginf(a).sum()))  # fmt: skip
    ours = (got.below_range, *got.bins, got.above_range, got.zeros, got.nan, got.pos_inf, got.neg_inf)
    yield Judged("all magnitudes and special values", "bins", float(sum(g != w for g, w in zip(ours, want, strict=True))), 0.0,
                 "bins that differ")  # fmt: skip
