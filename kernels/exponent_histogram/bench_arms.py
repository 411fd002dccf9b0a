"""What `python -m kernels bench` compares for exponent_histogram."""

import torch

from kernels.bench import BenchArm
from kernels.exponent_histogram import bytes_moved
from kernels.exponent_histogram.counts import ExponentHistogram
from kernels.exponent_histogram.op import exponent_histogram

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"cuda": [(65536, 768)], "cpu": [(1024, 768)]}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    arms = []
    for rows, width in SHAPES[device]:
        for dtype in dtypes or DTYPES:
            arms += _case(device, dtype, rows, width)
    return arms


def _case(device, dtype, rows, width):
    def values():
        return (torch.randn(rows, width, device=device) * 1e-3).to(DTYPES[dtype])

    def ours():
        x, out = values(), ExponentHistogram(device)
        return lambda: exponent_histogram(x, out=out)

    def eager():
        x = values()
        return lambda: by_frexp(x)

    case = f"{dtype} {rows}x{width}"
    size = bytes_moved(rows * width, DTYPES[dtype].itemsize)
    name = "triton" if device == "cuda" else "torch"
    return [BenchArm("exponent_histogram", case, name, ours, size), BenchArm("exponent_histogram", case, "eager", eager, 0)]


def by_frexp(x: torch.Tensor):
    """Counts per exponent with torch's own operators; histc instead of bincount, which would sync on CUDA."""
    exponents = torch.frexp(x.float()).exponent
    return torch.histc(exponents.float(), bins=82, min=-40.5, max=41.5), x.isnan().sum(), x.isinf().sum(), (x == 0).sum()
