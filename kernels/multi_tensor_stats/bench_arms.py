"""What `python -m kernels bench` compares for multi_tensor_stats, on lists shaped like real models."""

import torch

from kernels.bench import BenchArm
from kernels.multi_tensor_stats import bytes_moved
from kernels.multi_tensor_stats.op import multi_tensor_stats
from kernels.multi_tensor_stats.stats import TensorStats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def bench_arms(device: str, dtypes: list[str] | None = None) -> list[BenchArm]:
    return [
        arm
        for model, shapes in MODELS[device].items()
        for dtype in dtypes or DTYPES
        for arm in _case(device, dtype, model, shapes)
    ]


def tensors(device: str, dtype: str, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Values the size of gradients, so that every count has something to count."""
    return [(torch.randn(shape, device=device) * 1e-5).to(DTYPES[dtype]) for shape in shapes]


def _case(device, dtype, model, shapes):
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

    name = "triton" if device == "cuda" else "torch"
    x = [torch.Size(s).numel() for s in shapes]
    size = bytes_moved(x, [DTYPES[dtype].itemsize] * len(x))
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
        counts = [torch.count_nonzero(x), torch.count_nonzero(size <= 2.0**-25), torch.count_nonzero(size < 2.0**-24)]
        nonfinite = torch.count_nonzero(~x.isfinite())
        rest.append((torch.maximum(-low, high), *counts, torch.count_nonzero(size < 2.0**-14), nonfinite))
    return norms, rest
