"""What `python -m kernels bench` compares for activation_stats: the block outputs of GPT-2 124M, measured and not."""

import torch

from kernels.activation_stats import bytes_moved
from kernels.activation_stats.op import activation_stats
from kernels.activation_stats.ring import ActivationRing
from kernels.bench import BenchArm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"cuda": (13, 8192, 768), "cpu": (5, 512, 128)}


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [arm for dtype in dtypes or DTYPES for arm in _case(device, dtype, *SHAPES[device])]


def _case(device, dtype, outputs, rows, width):
    def values():
        return [torch.randn(rows, width, device=device).to(DTYPES[dtype]) for _ in range(outputs)]

    def ours(every, counts="all"):
        def setup():
            x, ring = values(), ActivationRing(outputs, 4, device, every=every)
            slots = ring.at(range(outputs))
            ring.tick()
            return lambda: activation_stats(x, slots, counts=counts)

        return setup

    def eager():
        x = values()
        return lambda: [per_tensor(t) for t in x]

    size = bytes_moved([rows * width] * outputs, [DTYPES[dtype].itemsize] * outputs)
    name = "triton" if device == "cuda" else "torch"
    case = f"{dtype} {outputs} outputs {rows}x{width}"
    arms = [(name, ours(1), size), (f"{name}_range", ours(1, "range"), size), (f"{name}_off", ours(0), 0), ("eager", eager, 0)]
    return [BenchArm("activation_stats", case, arm, setup, size) for arm, setup, size in arms]


def per_tensor(x: torch.Tensor):
    """absmax, rms and the counts of one output with torch's own operators; no sync."""
    low, high = torch.aminmax(x)
    size = x.abs()
    return (
        torch.maximum(-low, high),
        torch.linalg.vector_norm(x, dtype=torch.float32),
        torch.count_nonzero(x),
        torch.count_nonzero(~x.isfinite()),
        torch.count_nonzero(size > 65504),
        torch.count_nonzero(size <= 2.0**-25),
        torch.count_nonzero(size < 2.0**-14),
    )
