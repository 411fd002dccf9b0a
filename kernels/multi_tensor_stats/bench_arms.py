"""What `python -m kernels bench` and `check` ask of multi_tensor_stats, and the lists of tensors for every op on lists.

Bench: lists shaped like the gradients of real models. Check: exact counts, and norms within float64's last digits.
"""

from collections.abc import Callable, Iterator

import torch

from kernels.bench import BenchArm, own_name
from kernels.check import Judged, counted, differing, of_bound, with_special
from kernels.dispatch import DTYPES
from kernels.float_formats import FP16
from kernels.multi_tensor_stats import bytes_moved, multi_tensor_stats
from kernels.multi_tensor_stats.reference import FP16_FLUSH_AT, UNDERFLOW_BELOW, TensorStats

CHECKED = {"cuda": [(50304, 768), (1024, 768), (768,), (768, 3072), (7001,), (0,)], "cpu": [(64, 48), (768,), (7001,), (0,)]}
COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "below")


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50304, positions: int = 1024) -> list[tuple[int, ...]]:
    """Parameter shapes of GPT-2: 124M in 148 tensors by default."""
    w = width
    layer = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,), (w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(vocabulary, w), (positions, w), *layer * layers, (w,), (w,)]


def roberta(width: int = 768, layers: int = 12, vocabulary: int = 50304, positions: int = 514) -> list[tuple[int, ...]]:
    """Parameter shapes of RoBERTa with its MLM head (decoder tied): 125M in 202 tensors by default."""
    w = width
    attention = [(w, w), (w,)] * 4 + [(w,), (w,)]
    layer = [*attention, (4 * w, w), (4 * w,), (w, 4 * w), (w,), (w,), (w,)]
    return [(vocabulary, w), (positions, w), (1, w), (w,), (w,), *layer * layers, (w, w), (w,), (w,), (w,), (vocabulary,)]


MODELS = {
    "cuda": {"gpt2-124m": gpt2(), "roberta-base": roberta()},
    "cpu": {"gpt2-tiny": gpt2(128, 4, 2048, 128), "gpt2-24m": gpt2(384, 6, 32768, 512)},
}


def over_models(device: str, dtypes: list[str] | None, case: Callable[..., list[BenchArm]]) -> list[BenchArm]:
    """The arms of `case(device, dtype, model, shapes)` for every model and dtype."""
    return [
        arm
        for model, shapes in MODELS[device].items()
        for dtype in dtypes or DTYPES
        for arm in case(device, dtype, model, shapes)
    ]


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return over_models(device, dtypes, _case)


def sizes(dtype: str, shapes: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Elements of each tensor, and bytes of an element: what `bytes_moved` takes."""
    return [torch.Size(shape).numel() for shape in shapes], [DTYPES[dtype].itemsize] * len(shapes)


def tensors(device: str, dtype: str, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Values the size of gradients, so that every count has something to count."""
    return [(torch.randn(shape, device=device) * 1e-5).to(DTYPES[dtype]) for shape in shapes]


def _case(device: str, dtype: str, model: str, shapes: list[tuple[int, ...]]) -> list[BenchArm]:
    def ours(counts):
        def setup():
            x, out = tensors(device, dtype, shapes), TensorStats.allocate(len(shapes), device)
            return lambda: multi_tensor_stats(x, out=out, counts=counts)

        return setup

    def other(f):
        def setup():
            x = tensors(device, dtype, shapes)
            return lambda: f(x)

        return setup

    name = own_name(device)
    size = bytes_moved(*sizes(dtype, shapes))
    arms = [
        (name, ours("all"), size),
        (f"{name}_underflow", ours("underflow"), size),
        (f"{name}_no_counts", ours("none"), size),
        ("foreach_norm", other(torch._foreach_norm), size),
        ("eager", other(five_statistics), 0),
    ]
    case = f"{dtype} {model} gradients"
    return [BenchArm("multi_tensor_stats", case, arm, setup, size) for arm, setup, size in arms]


def five_statistics(tensors: list[torch.Tensor]):
    """The best eager way known to us: norm by foreach, range by aminmax, the counts by comparison; no sync."""
    norms = torch._foreach_norm(tensors)
    rest = []
    for x in tensors:
        low, high = torch.aminmax(x)
        size = x.abs()
        counts = [
            torch.count_nonzero(x),
            torch.count_nonzero(size <= FP16_FLUSH_AT),
            torch.count_nonzero(size < UNDERFLOW_BELOW),
        ]
        nonfinite = torch.count_nonzero(~x.isfinite())
        rest.append((torch.maximum(-low, high), *counts, torch.count_nonzero(size < FP16.smallest_normal), nonfinite))
    return norms, rest


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    tensors = [(torch.randn(shape, device=device) * 1e-5).to(dtype) for shape in CHECKED[device.type]]
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
