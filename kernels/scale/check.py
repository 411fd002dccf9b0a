"""What `python -m kernels check` asks of scale_: every element is the float64 product, rounded to fp32 and to the dtype."""

from collections.abc import Iterator

import torch

from kernels.check import Judged, with_special
from kernels.multi_tensor_stats.check import SHAPES
from kernels.scale.op import scale_

FACTORS = (1 / 3, 2.0**-30, 1.0)
"""One with more digits than bf16 has, one that fp16 holds as 0, and the one that must change nothing."""


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    for number in FACTORS:
        factor = torch.tensor(number, device=device)
        tensors = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES[device.type]]
        tensors = [with_special(x) if x.numel() else x for x in tensors]
        tensors.append(tensors[0].clone()[:, ::2])  # one that is not dense
        want = [(x.double() * factor.double()).float().to(dtype) for x in tensors]  # 48 bits at most: exact in float64
        scale_(tensors, factor, impl=impl)
        unequal = sum(int((~((x == w) | (x.isnan() & w.isnan()))).sum()) for x, w in zip(tensors, want, strict=True))
        yield Judged(f"factor {number:.3g}", "products", float(unequal), 0.0, "elements that differ")
