"""What `python -m kernels bench` and `check` ask of the ops on logits: two losses and logit_stats.

Bench: a loss's full forward and backward to the logits. Check: a loss against its formula in float64, with the error of
eager torch in the same dtype; of the statistics exact counts, and the place of the largest.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.bce_with_logits import bce_with_logits
from kernels.bce_with_logits import bytes_moved as bce_bytes
from kernels.bce_with_logits.reference import dense_targets
from kernels.bench import BenchArm, own_name, timed
from kernels.check import Judged, counted, differing, of_bound, with_special
from kernels.cross_entropy import bytes_moved as cross_entropy_bytes
from kernels.cross_entropy import cross_entropy
from kernels.dispatch import DTYPES
from kernels.float_formats import FP16, float_format
from kernels.logit_stats import LogitStats, logit_stats
from kernels.logit_stats import bytes_moved as logit_stats_bytes

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
INTERPRETED_ULP = {**ULP, torch.bfloat16: 2.0**-6}  # Triton's interpreter truncates where a GPU rounds to nearest

CROSS_ENTROPY_SHAPES = {
    "cuda": [(8192, v) for v in (4096, 32768, 50304, 128256)],
    "cpu": [(8, 100), (128, 4096), (512, 8192), (64, 50304)],
}
CROSS_ENTROPY_CHECKED = {"cuda": (512, 50304), "cpu": (24, 1024)}
CROSS_ENTROPY_OPTIONS = {
    "mean": {},
    "ignored rows, pad columns": {"ignore_index": -100, "valid_vocab": True},
    "label smoothing": {"label_smoothing": 0.1},
    "loss scale 65,536 in the gradient": {"grad_scale": 65536.0},
    "gradient in place": {"inplace_grad": True},
}
BCE_SHAPES = {"cuda": [(16384, 4272)], "cpu": [(256, 4272), (32, 100)]}
BCE_CHECKED = {"cuda": (4096, 4271), "cpu": (16, 301)}
LABELS, CHECKED_LABELS = 8, 5
LOGIT_STATS_SHAPES = {"cuda": [(8192, 50304)], "cpu": [(128, 50304)]}
LOGIT_STATS_CHECKED = {"cuda": (2048, 50304), "cpu": (12, 1009)}


def _loss_arms(
    op: str,
    case: str,
    device: str,
    inputs: Callable[[], tuple],
    ours: Callable[..., torch.Tensor],
    eager: Callable[..., torch.Tensor],
    divisor: int,
    size: int,
    **on_gpu: Callable[[], Callable[..., torch.Tensor]],
) -> list[BenchArm]:
    """Forward and backward to the logits: ours with and without statistics, eager torch and, on a GPU, torch.compile.

    inputs   makes (logits, targets for ours, targets for the others)
    ours     (logits, targets, grad_scale, stats) -> loss: with grad_scale, as in a training loop, fp16 gradients are made
             in the forward pass too
    eager    (logits, targets, reduction) -> loss, in fp32 from logits of any dtype
    divisor  of the mean. Our arms and "eager_normalizer" divide by it as by a number of its own, that of a whole step
    size     device-memory bytes that ours must move
    on_gpu   further arms of a GPU: functions that import and return (logits, targets) -> loss
    """

    def our_loss(with_stats):
        stats, scale = LogitStats(device) if with_stats else None, torch.full((), 1.0 / divisor, device=device)
        return lambda logits, targets, _: ours(logits, targets, scale, stats)

    def other_loss(loss_of):
        return lambda logits, _, dense: loss_of(logits, dense)

    name = own_name(device)
    arms = {name: lambda: our_loss(True), f"{name}_no_stats": lambda: our_loss(False), "eager": lambda: other_loss(eager)}
    arms["eager_normalizer"] = lambda: other_loss(lambda logits, targets: eager(logits, targets, "sum") / divisor)
    if device == "cuda":
        on_gpu = {"compile": lambda: torch.compile(eager, dynamic=False)} | on_gpu
        arms |= {arm: lambda make=make: other_loss(make()) for arm, make in on_gpu.items()}

    def arm_of(arm, make):
        setup = timed(lambda: (make(), inputs()), lambda x: torch.autograd.grad(x[0](*x[1]), x[1][0]))
        return BenchArm(op, case, arm, setup, size if arm.startswith(name) else 0)

    return [arm_of(arm, make) for arm, make in arms.items()]


def _judge_loss(
    case: str,
    loss: torch.Tensor,
    grad: torch.Tensor,
    logits: torch.Tensor,
    total_of: Callable[[torch.Tensor], torch.Tensor],
    factor: float,
    divisor: float,
    weight: float,
    floor: float,
) -> Iterator[Judged]:
    """Loss and gradient may err by no more than eager torch's fp32 loss math does, plus one rounding.

    total_of  sum of the row losses of logits, in their dtype; the gradient is `factor` times its own
    divisor   of the sum in `loss`
    weight    largest factor of an fp32 probability in the gradient; floor: absolute error allowed in the loss
    """

    def loss_and_gradient(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().clone().requires_grad_()
        total = total_of(z)
        (gradient,) = torch.autograd.grad(total, z, torch.full_like(total, factor))
        return total.detach().double(), gradient

    (exact_loss, exact_grad), (eager_loss, eager_grad) = loss_and_gradient(logits.double()), loss_and_gradient(logits.float())
    allowed = ((eager_loss - exact_loss) / divisor).abs().item() + 2.0**-22 * abs(exact_loss.item() / divisor) + floor
    yield Judged(case, "loss", *of_bound((loss.double() - exact_loss / divisor).abs(), allowed))
    ulp = (INTERPRETED_ULP if grad.device.type == "cpu" else ULP)[grad.dtype]
    theirs = (eager_grad.to(grad.dtype).double() - exact_grad).abs().max()
    bound = theirs + ulp * exact_grad.abs() + 2.0**-23 * weight + float_format(grad.dtype).smallest_subnormal
    yield Judged(case, "gradient", *of_bound((grad.double() - exact_grad).abs(), bound))


def cross_entropy_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    for rows, width in CROSS_ENTROPY_SHAPES[device]:

        def inputs(rows=rows, width=width):
            logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
            targets = torch.randint(0, width, (rows,), device=device)
            return logits, targets, targets

        def ours(logits, targets, grad_scale, stats, rows=rows):
            return cross_entropy(logits, targets, normalizer=rows, grad_scale=grad_scale, stats=stats)

        case, size = f"{dtype} {rows}x{width}", cross_entropy_bytes(rows, width, DTYPES[dtype].itemsize)
        yield from _loss_arms("cross_entropy", case, device, inputs, ours, eager_cross_entropy, rows, size, liger=_liger)


def eager_cross_entropy(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.float(), targets, reduction=reduction)


def _liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def cross_entropy_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = CROSS_ENTROPY_CHECKED[device.type]
    for case, options in CROSS_ENTROPY_OPTIONS.items():
        logits = (torch.randn(rows, width, device=device) * 4).to(dtype)
        options, smoothing = dict(options), options.get("label_smoothing", 0.0)
        valid = width - 47 if options.pop("valid_vocab", False) else width
        targets = torch.randint(0, valid, (rows,), device=device)
        if "ignore_index" in options:
            targets[::3] = -100
        count = int((targets != -100).sum())
        if "grad_scale" in options:
            options["grad_scale"] /= count
        factor = options.get("grad_scale", 1.0 / count)

        def total_of(z, targets=targets, valid=valid, smoothing=smoothing):
            return F.cross_entropy(z[:, :valid], targets, label_smoothing=smoothing, reduction="sum")

        leaf = logits.clone().requires_grad_()
        inplace = options.get("inplace_grad", False)
        loss = cross_entropy(leaf * 1 if inplace else leaf, targets, valid_vocab=valid, impl=impl, **options)
        loss.backward()
        yield from _judge_loss(case, loss, leaf.grad, logits, total_of, factor, count, factor, floor=1e-7)


def bce_with_logits_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    b = DTYPES[dtype].itemsize
    for rows, width in BCE_SHAPES[device]:
        for sparse in (False, True):

            def inputs(rows=rows, width=width, sparse=sparse):
                logits = torch.randn(rows, width, device=device).mul_(3).to(DTYPES[dtype]).requires_grad_()
                labels = torch.randint(0, width, (rows, LABELS), device=device)
                dense = torch.zeros(rows, width, device=device, dtype=DTYPES[dtype]).scatter_(1, labels, 1.0)
                return logits, labels if sparse else dense, dense

            def ours(logits, targets, grad_scale, stats):
                return bce_with_logits(logits, targets, grad_scale=grad_scale, stats=stats)

            size = bce_bytes(rows, width, b, dense_target_bytes=0 if sparse else b, labels_per_row=LABELS if sparse else 0)
            case = f"{dtype} {rows}x{width} {'sparse' if sparse else 'dense'}"
            yield from _loss_arms("bce_with_logits", case, device, inputs, ours, eager_bce_with_logits, rows * width, size)


def eager_bce_with_logits(logits, dense, reduction="mean"):
    return F.binary_cross_entropy_with_logits(logits.float(), dense.float(), reduction=reduction)


def bce_with_logits_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = BCE_CHECKED[device.type]
    weights = torch.rand(width, device=device) * 3 + 0.5
    for case, reduction, weight, scale in (("mean", "mean", None, None), ("label sum, weighted", "label_sum", weights, None),
                                           ("loss scale 65,536 in the gradient", "mean", None, 65536.0)):  # fmt: skip
        logits = (torch.randn(rows, width, device=device) * 6 - 4).to(dtype)
        labels = torch.randint(-1, width, (rows, CHECKED_LABELS), device=device)
        divisor = rows * width if reduction == "mean" else rows
        factor = (scale or 1.0) / divisor

        def total_of(z, labels=labels, weight=weight):
            y, pos_weight = dense_targets(labels, width).to(z.dtype), None if weight is None else weight.to(z.dtype)
            return F.binary_cross_entropy_with_logits(z, y, pos_weight=pos_weight, reduction="sum")

        leaf = logits.clone().requires_grad_()
        loss = bce_with_logits(leaf, labels, pos_weight=weight, reduction=reduction, impl=impl,
                               grad_scale=None if scale is None else factor)  # fmt: skip
        loss.backward()
        largest = 1.0 if weight is None else weight.max().item()
        yield from _judge_loss(case, loss, leaf.grad, logits, total_of, factor, divisor, factor * largest, floor=1e-9)


def logit_stats_arms(device: str, dtype: str) -> Iterator[BenchArm]:
    for rows, width in LOGIT_STATS_SHAPES[device]:

        def logits(rows=rows, width=width):
            return torch.randn(rows, width, device=device).to(DTYPES[dtype])

        case, size = f"{dtype} {rows}x{width}", logit_stats_bytes(rows, width, DTYPES[dtype].itemsize)
        ours = timed(lambda make=logits: (make(), LogitStats(device)), lambda x: (x[1].reset(), logit_stats(*x)))
        yield BenchArm("logit_stats", case, own_name(device), ours, size)
        yield BenchArm("logit_stats", case, "eager", timed(logits, eager_logit_stats), 0)


def eager_logit_stats(x):
    """What one writes without a kernel, synchronisation left out: the same figures but the place."""
    size = x.abs()
    finite = size.isfinite()
    over_fp16 = ((size > FP16.max) & finite).sum()
    return size.where(finite, 0).amax(), x.isnan().sum(), (x == torch.inf).sum(), (x == -torch.inf).sum(), over_fp16


def logit_stats_checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    x = (torch.randn(LOGIT_STATS_CHECKED[device.type], device=device) * 8).to(dtype)
    for case, values in (("random", x), ("special values", with_special(x.clone()))):
        stats = LogitStats(device)
        logit_stats(values, stats, impl=impl)
        got, want = stats.read(), counted(values)
        want = {"absmax": want["absmax"], "nan": want["nan"], "over_fp16": want["over_fp16"],
                "pos_inf": int((values == float("inf")).sum()), "neg_inf": int((values == -float("inf")).sum())}  # fmt: skip
        yield Judged(case, "counts", *differing(got, want))
        there = values[got["row"], got["col"]].double().abs().item() if got["row"] is not None else float("nan")
        yield Judged(case, "place of the largest", abs(there - want["absmax"]), 0.0, "its distance from the largest")


ARMS = {"logit_stats": logit_stats_arms, "cross_entropy": cross_entropy_arms, "bce_with_logits": bce_with_logits_arms}
CHECKS = {"logit_stats": logit_stats_checks, "cross_entropy": cross_entropy_checks, "bce_with_logits": bce_with_logits_checks}
