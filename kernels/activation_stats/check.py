"""What `python -m kernels check` asks of activation_stats: exact counts, rms against float64, one cell a tensor."""

from collections.abc import Iterator

import torch

from kernels.activation_stats.op import activation_stats
from kernels.activation_stats.ring import ActivationRing
from kernels.check import Judged, counted, differing, of_bound, with_special

SHAPES = {"cuda": [(16, 1024, 768), (16, 1024, 3072), (4099,)], "cpu": [(4, 32, 48), (4099,)]}
COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "over_fp16")


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES[device.type]]
    special = [with_special(x.clone()) for x in tensors]
    for case, values in (("random", tensors), ("special values", special)):
        for counts in ("all", "range"):
            ring = ActivationRing(len(values), 2, device)
            ring.tick()
            activation_stats(values, ring.at(range(len(values))), counts=counts, impl=impl)
            names = COUNTS if counts == "all" else ("numel", "absmax", "nan", "inf")
            cells, wrong, errors = ring.read(), 0.0, [0.0]
            for x, cell in zip(values, cells, strict=True):
                want = counted(x)
                wrong += differing(vars(cell), {name: want[name] for name in names})[0]
                if counts == "all" and case == "random":
                    rms = x.double().square().mean().sqrt().item()
                    errors.append(abs(cell.rms - rms) / rms)
            yield Judged(f"{case}, counts={counts}", "counts", wrong, 0.0, "counts that differ")
            if len(errors) > 1:
                yield Judged(f"{case}, counts={counts}", "rms", *of_bound(torch.tensor(errors), 1e-6))
