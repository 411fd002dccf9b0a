"""What `python -m kernels bench` and `check` ask of activation_stats.

Bench: the block outputs of GPT-2 124M, measured and not. Check: exact counts, rms against float64, one cell a tensor.
"""

from collections.abc import Iterator

import torch

from kernels.activation_stats import ActivationRing, activation_stats, bytes_moved
from kernels.bench import BenchArm, own_name
from kernels.check import Judged, counted, differing, of_bound, with_special
from kernels.dispatch import DTYPES
from kernels.float_formats import FP16
from kernels.multi_tensor_stats.reference import FP16_FLUSH_AT

SHAPES = {"cuda": (13, 8192, 768), "cpu": (5, 512, 128)}
CHECKED = {"cuda": [(16, 1024, 768), (16, 1024, 3072), (4099,)], "cpu": [(4, 32, 48), (4099,)]}
COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "over_fp16")


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [arm for dtype in dtypes or DTYPES for arm in _case(device, dtype, *SHAPES[device])]


def _case(device: str, dtype: str, outputs: int, rows: int, width: int) -> list[BenchArm]:
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
    name = own_name(device)
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
        torch.count_nonzero(size > FP16.max),
        torch.count_nonzero(size <= FP16_FLUSH_AT),
        torch.count_nonzero(size < FP16.smallest_normal),
    )


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in CHECKED[device.type]]
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
