"""What `python -m kernels bench` and `check` ask of the statistics of lists of tensors, and of unscaling and scaling them.

Bench: lists shaped like the gradients of real models, and the block outputs of GPT-2 124M. Check: exact counts, norms
within float64's last digits, products bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from kernels.activation_stats import ActivationRing, activation_stats
from kernels.activation_stats import bytes_moved as activation_bytes
from kernels.bench import BenchArm, own_name, timed
from kernels.check import Judged, counted, differing, of_bound, with_special
from kernels.dispatch import DTYPES
from kernels.exponent_histogram import HIGHEST, LOWEST, exponent_histogram
from kernels.float_formats import FP16
from kernels.multi_tensor_stats import bytes_moved as stats_bytes
from kernels.multi_tensor_stats import multi_tensor_stats
from kernels.multi_tensor_stats.reference import FP16_FLUSH_AT, UNDERFLOW_BELOW, TensorStats
from kernels.unscale import bytes_moved as unscale_bytes
from kernels.unscale import scale_, unscale_and_stats_

CHECKED = {"cuda": [(50304, 768), (1024, 768), (768,), (768, 3072), (7001,), (0,)], "cpu": [(64, 48), (768,), (7001,), (0,)]}
TENSOR_COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "below")
MAX_NORM = 1e9
INV_SCALES = (2.0**-16, 1 / 30_000)
FACTORS = (1 / 3, 2.0**-30, 1.0)
"""One with more digits than bf16 has, one that fp16 holds as 0, and the one that must change nothing."""

HISTOGRAM_CHECKED = {"cuda": 20_000_003, "cpu": 5_003}  # elements
OUTPUTS = {"cuda": (13, 8192, 768), "cpu": (5, 512, 128)}
OUTPUTS_CHECKED = {"cuda": [(16, 1024, 768), (16, 1024, 3072), (4099,)], "cpu": [(4, 32, 48), (4099,)]}
OUTPUT_COUNTS = ("numel", "absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "over_fp16")


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


def _gradients(device: str, dtype: str, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Values the size of gradients, so that every count has something to count."""
    return [(torch.randn(shape, device=device) * 1e-5).to(DTYPES[dtype]) for shape in shapes]


def _sizes(dtype: str, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Elements of each tensor, and bytes of an element."""
    return [torch.Size(shape).numel() for shape in shapes], [DTYPES[dtype].itemsize] * len(shapes)


def _over_models(op: str, device: str, dtype: str, arms: Callable[[list[tuple[int, ...]]], list[tuple]]) -> Iterator[BenchArm]:
    """The arms (name, setup, bytes moved) of the gradients of every model."""
    for model, shapes in MODELS[device].items():
        yield from (BenchArm(op, f"{dtype} {model} gradients", *arm) for arm in arms(shapes))


def multi_tensor_stats_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    def arms(shapes):
        def ours(counts):
            out = partial(TensorStats.allocate, len(shapes), device)
            return timed(lambda: (gradients(), out()), lambda x: multi_tensor_stats(x[0], out=x[1], counts=counts))

        gradients = partial(_gradients, device, dtype, shapes)
        name, size = own_name(device), stats_bytes(*_sizes(dtype, shapes))
        return [
            (name, ours("all"), size),
            (f"{name}_underflow", ours("underflow"), size),
            (f"{name}_no_counts", ours("none"), size),
            ("foreach_norm", timed(gradients, torch._foreach_norm), size),
            ("eager", timed(gradients, eager_statistics), 0),
        ]

    return _over_models("multi_tensor_stats", device, dtype, arms)


def eager_statistics(tensors: list[torch.Tensor]):
    """The best eager way known to us: norm by foreach, range by aminmax, the counts by comparison; no sync."""
    norms = torch._foreach_norm(tensors)
    rest = []
    for x in tensors:
        low, high = torch.aminmax(x)
        size = x.abs()
        limits = [size <= FP16_FLUSH_AT, size < UNDERFLOW_BELOW, size < FP16.smallest_normal, ~x.isfinite()]
        rest.append((torch.maximum(-low, high), torch.count_nonzero(x), *map(torch.count_nonzero, limits)))
    return norms, rest


def multi_tensor_stats_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    tensors = [(torch.randn(shape, device=device) * 1e-5).to(dtype) for shape in CHECKED[device.type]]
    tensors.append(tensors[0][:, ::2])  # one that is not dense
    special = [with_special(x.clone()) if x.numel() else x for x in tensors]
    huge = [torch.full((9001,), 1e25 if dtype != torch.float16 else 6e4, device=device, dtype=dtype)]
    for case, values in (("gradients", tensors), ("special values", special), ("squares beyond fp32", huge)):
        reading, wrong, errors = multi_tensor_stats(values, impl=impl).read(), 0.0, [0.0]
        for x, got in zip(values, reading.tensors, strict=True):
            want = counted(x)
            wrong += differing(vars(got), {name: want[name] for name in TENSOR_COUNTS})[0]
            norm = x.detach().double().norm().item()
            if norm < float("inf"):
                errors.append(abs(got.norm - norm) / max(norm, 1e-300))
            else:
                wrong += got.norm < float("inf")
        yield Judged(case, "counts", wrong, 0.0, "counts that differ")
        yield Judged(case, "norms", *of_bound(torch.tensor(errors), 1e-6))


def unscale_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    """Scale and clip factor are 1, so that values stay."""

    def arms(shapes):
        def ours(clip):
            def inputs():
                out = TensorStats.allocate(len(shapes), device)
                return _gradients(device, dtype, shapes), torch.ones((), device=device), out

            return timed(inputs, lambda x: unscale_and_stats_(*x[:2], max_norm=MAX_NORM, clip=clip, out=x[2]))

        def parameters():
            made = [torch.nn.Parameter(x) for x in _gradients(device, dtype, shapes)]
            for p in made:
                p.grad = p.detach()
            return made, [p.grad for p in made], torch.zeros((), device=device), torch.ones((), device=device)

        def by_torch(statistics):
            """The kernels of GradScaler.unscale_ and clip_grad_norm_(foreach=True), without their bookkeeping. They
            measure nothing; `statistics` adds what our op reports, in eager torch."""

            def call(x):
                made, grads, found_inf, inv_scale = x
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
                if statistics:
                    eager_statistics(grads)
                return torch.nn.utils.clip_grad_norm_(made, MAX_NORM, foreach=True)

            return timed(parameters, call)

        name, sizes = own_name(device), _sizes(dtype, shapes)
        return [
            (f"{name}_clip", ours(True), unscale_bytes(*sizes, clip=True)),
            (f"{name}_in_place", ours(False), unscale_bytes(*sizes, clip=False)),
            ("unscale_and_clip_grad_norm", by_torch(False), 0),
            ("eager_with_statistics", by_torch(True), 0),
        ]

    # fp16 is refused, as GradScaler does.
    return iter(()) if dtype == "fp16" else _over_models("unscale", device, dtype, arms)


def unscale_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    """Torch's own GradScaler kernel bit for bit, and the norm."""
    if dtype == torch.float16:  # refused, as GradScaler does
        return
    for inv_scale in INV_SCALES:
        for bad in (None, float("inf")):
            grads = [torch.randn(shape, device=device).to(dtype) for shape in CHECKED[device.type]]
            if bad is not None:
                grads[1].view(-1)[7] = bad
            theirs, found_inf = [g.clone() for g in grads], torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(theirs, found_inf, torch.tensor(inv_scale, device=device))
            out = unscale_and_stats_(grads, torch.tensor(inv_scale, device=device), impl=impl)
            case = f"1/scale {inv_scale:.3g}, {'finite' if bad is None else 'one Inf'}"
            yield Judged(case, "unscaled gradients", _unequal(grads, theirs), 0.0, "elements that differ")
            yield Judged(case, "found_inf", abs(out.found_inf.item() - found_inf.item()), 0.0, "its distance from torch's")
            if bad is None:
                norm = torch.stack([t.double().norm() for t in theirs]).norm().item()
                yield Judged(case, "norm", *of_bound(torch.tensor([abs(out.total_norm.item() - norm) / norm]), 1e-6))


def _unequal(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """How many elements differ; a NaN equals a NaN."""
    return float(sum(int((~((g == w) | (g.isnan() & w.isnan()))).sum()) for g, w in zip(got, want, strict=True)))


def scale_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    """The factor is next to 1, so that values stay. In 16 bits on CUDA foreach_mul is no equal: it rounds the factor first."""

    def arms(shapes):
        def inputs():
            return _gradients(device, dtype, shapes), torch.tensor(1 - 2.0**-24, device=device)

        size, ways = unscale_bytes(*_sizes(dtype, shapes)), {own_name(device): scale_, "foreach_mul": torch._foreach_mul_}
        return [(name, timed(inputs, lambda x, f=f: f(*x)), size) for name, f in ways.items()]

    return _over_models("scale", device, dtype, arms)


def scale_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    """Every element is the float64 product, rounded to fp32 and to the dtype."""
    for number in FACTORS:
        factor = torch.tensor(number, device=device)
        tensors = [torch.randn(shape, device=device).to(dtype) for shape in CHECKED[device.type]]
        tensors = [with_special(x) if x.numel() else x for x in tensors]
        tensors.append(tensors[0].clone()[:, ::2])  # one that is not dense
        want = [(x.double() * factor.double()).float().to(dtype) for x in tensors]  # 48 bits at most: exact in float64
        scale_(tensors, factor, impl=impl)
        yield Judged(f"factor {number:.3g}", "products", _unequal(tensors, want), 0.0, "elements that differ")


def exponent_histogram_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    """Every bin, by numpy's frexp in float64."""
    x = torch.randn(HISTOGRAM_CHECKED[device.type], device=device)
    x = with_special((x * torch.exp2(torch.randint(-30, 15, x.shape, device=device))).to(dtype))
    got = exponent_histogram(x)
    a = x.cpu().double().numpy()
    exponents = np.frexp(np.abs(a[np.isfinite(a) & (a != 0)]))[1] - 1
    places = np.clip(exponents - LOWEST + 1, 0, HIGHEST - LOWEST + 2)  # 0: below the first bin
    bins = [int(n) for n in np.bincount(places, minlength=HIGHEST - LOWEST + 3)]
    want = (*bins, int((a == 0).sum()), int(np.isnan(a).sum()), int(np.isposinf(a).sum()), int(np.isneginf(a).sum()))
    ours = (got.below_range, *got.bins, got.above_range, got.zeros, got.nan, got.pos_inf, got.neg_inf)
    unequal = float(sum(g != w for g, w in zip(ours, want, strict=True)))
    yield Judged("all magnitudes and special values", "bins", unequal, 0.0, "bins that differ")


def activation_stats_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    """Measured at every step, at every step but the range alone, and not measured."""
    outputs, rows, width = OUTPUTS[device]

    def values():
        return [torch.randn(rows, width, device=device).to(DTYPES[dtype]) for _ in range(outputs)]

    def ours(every, counts="all"):
        def setup():
            x, ring = values(), ActivationRing(outputs, 4, device, every=every)
            slots = ring.at(range(outputs))
            ring.tick()
            return lambda: activation_stats(x, slots, counts=counts)

        return setup

    eager = timed(values, lambda x: [eager_output_statistics(t) for t in x])
    size = activation_bytes([rows * width] * outputs, [DTYPES[dtype].itemsize] * outputs)
    name = own_name(device)
    arms = [(name, ours(1), size), (f"{name}_range", ours(1, "range"), size), (f"{name}_off", ours(0), 0), ("eager", eager, 0)]
    return (BenchArm("activation_stats", f"{dtype} {outputs} outputs {rows}x{width}", *arm) for arm in arms)


def eager_output_statistics(x: torch.Tensor):
    """absmax, rms and the counts of one output with torch's own operators; no sync."""
    low, high = torch.aminmax(x)
    size = x.abs()
    limits = [~x.isfinite(), size > FP16.max, size <= FP16_FLUSH_AT, size < FP16.smallest_normal]
    rms = torch.linalg.vector_norm(x, dtype=torch.float32)
    return torch.maximum(-low, high), rms, torch.count_nonzero(x), *map(torch.count_nonzero, limits)


def activation_stats_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    """Exact counts, rms against float64, one cell a tensor."""
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in OUTPUTS_CHECKED[device.type]]
    special = [with_special(x.clone()) for x in tensors]
    for case, values in (("random", tensors), ("special values", special)):
        for counts in ("all", "range"):
            ring = ActivationRing(len(values), 2, device)
            ring.tick()
            activation_stats(values, ring.at(range(len(values))), counts=counts, impl=impl)
            names = OUTPUT_COUNTS if counts == "all" else ("numel", "absmax", "nan", "inf")
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


ARMS = {
    "multi_tensor_stats": multi_tensor_stats_arms,
    "unscale": unscale_arms,
    "scale": scale_arms,
    "activation_stats": activation_stats_arms,
}
CHECKS = {
    "multi_tensor_stats": multi_tensor_stats_checks,
    "unscale": unscale_checks,
    "scale": scale_checks,
    "exponent_histogram": exponent_histogram_checks,
    "activation_stats": activation_stats_checks,
}
