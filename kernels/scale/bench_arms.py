"""What `python -m kernels bench` and `check` ask of scale_.

Bench: the factor is next to 1, so that values stay. Check: every element is the float64 product, rounded to fp32 and to
the dtype.
"""

from collections.abc import Iterator

import torch

from kernels.bench import BenchArm, own_name
from kernels.check import Judged, with_special
from kernels.multi_tensor_stats.bench_arms import CHECKED, over_models, sizes, tensors
from kernels.scale import bytes_moved, scale_

FACTORS = (1 / 3, 2.0**-30, 1.0)
"""One with more digits than bf16 has, one that fp16 holds as 0, and the one that must change nothing."""


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return over_models(device, dtypes, _case)


def _case(device: str, dtype: str, model: str, shapes: list[tuple[int, ...]]) -> list[BenchArm]:
    def arm(multiply):
        def setup():
            x, factor = tensors(device, dtype, shapes), torch.tensor(1 - 2.0**-24, device=device)
            return lambda: multiply(x, factor)

        return setup

    # In 16 bits on CUDA foreach_mul is no equal: it rounds the factor first.
    arms, size = [(own_name(device), scale_), ("foreach_mul", torch._foreach_mul_)], bytes_moved(*sizes(dtype, shapes))
    return [BenchArm("scale", f"{dtype} {model} gradients", name, arm(multiply), size) for name, multiply in arms]


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    for number in FACTORS:
        factor = torch.tensor(number, device=device)
        tensors = [torch.randn(shape, device=device).to(dtype) for shape in CHECKED[device.type]]
        tensors = [with_special(x) if x.numel() else x for x in tensors]
        tensors.append(tensors[0].clone()[:, ::2])  # one that is not dense
        want = [(x.double() * factor.double()).float().to(dtype) for x in tensors]  # 48 bits at most: exact in float64
        scale_(tensors, factor, impl=impl)
        unequal = sum(int((~((x == w) | (x.isnan() & w.isnan()))).sum()) for x, w in zip(tensors, want, strict=True))
        yield Judged(f"factor {number:.3g}", "products", float(unequal), 0.0, "elements that differ")
