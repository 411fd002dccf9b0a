"""What `python -m kernels bench` compares for scale_. The factor is next to 1, so that values stay."""

import torch

from kernels.bench import BenchArm
from kernels.multi_tensor_stats.bench_arms import DTYPES, MODELS, tensors
from kernels.scale import bytes_moved
from kernels.scale.op import scale_


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [
        arm
        for model, shapes in MODELS[device].items()
        for dtype in dtypes or DTYPES
        for arm in _case(device, dtype, model, shapes)
    ]


def _case(device, dtype, model, shapes):
    def arm(multiply):
        def setup():
            x, factor = tensors(device, dtype, shapes), torch.tensor(1 - 2.0**-24, device=device)
            return lambda: multiply(x, factor)

        return setup

    x = [torch.Size(s).numel() for s in shapes]
    size = bytes_moved(x, [DTYPES[dtype].itemsize] * len(x))
    case = f"{dtype} {model} gradients"
    # In 16 bits on CUDA foreach_mul is no equal: it rounds the factor first.
    arms = [("triton" if device == "cuda" else "torch", scale_), ("foreach_mul", torch._foreach_mul_)]
    return [BenchArm("scale", case, name, arm(multiply), size) for name, multiply in arms]
