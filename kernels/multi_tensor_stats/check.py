"""What `python -m kernels check` asks of multi_tensor_stats: exact counts, and norms within float64's last digits."""

from collections.abc import Iterator

import torch

from kernels.check import Judged, counted, differing, of_bound, with_special
from kernels.multi_tensor_stats.op import multi_tensor_stats

SHAPES = {"cuda": [(50304, 768), (1024, 768), (768,), (768, 3072), (7001,), (0,)], "cpu": [(64, 48), (768,), (7001,), (0,)]}
COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "below")


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    tensors = [(torch.randn(shape, device=device) * 1e-5).to(dtype) for shape in SHAPES[device.type]]
    tensors.append(tensors[0][:, ::2])  # one that is not dense
    yield from judge("gradients", tensors, multi_tensor_stats(tensors, impl=impl))
    special = [with_special(x.clone()) if x.numel() else x for x in tensors]
    yield from judge("special values", special, multi_tensor_stats(special, impl=impl))
    huge = [torch.full((9001,), 1e25 if dtype != torch.float16 else 6e4, device=device, dtype=dtype)]
    yield from judge("squares beyond fp32", huge, multi_tensor_stats(huge, impl=impl))


def judge(case: str, tensors: list[torch.Tensor], stats) -> Iterator[Judged]:
    """Every tensor's counts, and its norm where it is finite."""
    reading, wrong, errors = stats.read(), 0.0, [0.0]
    for x, got in zip(tensors, reading.tensors, strict=True):
        want = counted(x)
        wrong += differing(vars(got), {name: want[name] for name in COUNTS})[0]
        norm = x.detach().double().norm().item()
        if norm < float("inf"):
            errors.append(abs(got.norm - norm) / max(norm, 1e-300))
        else:
            wrong += got.norm < float("inf")
    yield Judged(case, "counts", wrong, 0.0, "counts that differ")
    yield Judged(case, "norms", *of_bound(torch.tensor(errors), 1e-6))
