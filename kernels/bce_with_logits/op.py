"""bce_with_logits: the public op, its checks, and the way a call takes."""

import torch
from torch.compiler import is_compiling

from kernels.bce_with_logits.compiled import compiled_bce
from kernels.bce_with_logits.job import BceJob, loss_factor
from kernels.bce_with_logits.small import small_bce
from kernels.dispatch import FLOAT_DTYPES, check_device_scalar, check_float, check_same_device, resolve_impl
from kernels.fused_loss import fused_loss
from kernels.logit_stats.accumulator import LogitStats
from kernels.small_loss import is_small

REDUCTIONS = ("mean", "sum", "label_sum")


def bce_with_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    pos_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: int | float | torch.Tensor | None = None,
    grad_scale: float | torch.Tensor | None = None,
    stats: LogitStats | None = None,
    inplace_grad: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Binary cross-entropy with logits, fp32 (), with logit statistics and the gradient in one pass.

    logits        (T, L) fp32, bf16 or fp16: T documents, L labels; row stride free, columns contiguous (others copied)
    targets       dense (T, L), floating (in [0, 1]) or bool; or sparse (T, K) int64: the label indices of each
                  document in any order, filled up with -1; an index given twice counts once
    pos_weight    (L,) weight of the positive term, or None for 1
    reduction     "sum"; "mean", over all T L elements; "label_sum", sum over labels and mean over documents
    normalizer    number or device scalar that replaces the divisor, T L of "mean" or T of "label_sum": the
                  elements or documents of a whole accumulation step
    grad_scale    number or device scalar that *replaces* 1/divisor in the gradient: the loss scale times 1/divisor,
                  multiplied in before the gradient is rounded; see `cross_entropy`
    stats         a LogitStats: statistics of all logits, and a count of label indices out of range
    inplace_grad  overwrite the logits with their gradient; anyone else who saved them fails in backward

    Logits of +-Inf: the loss is the limit, 0 where the sign agrees with a hard target and +Inf where it does not,
    and the gradient is finite. NaN makes loss and gradient NaN. A label index out of range raises IndexError at once
    on a CPU (impl "torch"); elsewhere its row becomes NaN and `stats.read()` raises. Never syncs on CUDA.
    Deterministic. TypeError, ValueError: dtype, shape, device, options. RuntimeError: as in `cross_entropy`.
    """
    if is_small(logits, impl, inplace_grad):
        loss = small_bce(logits, targets, pos_weight, reduction, normalizer, grad_scale, stats)
        if loss is not None:
            return loss
    check_float("bce_with_logits", "logits", logits)
    choice = resolve_impl("bce_with_logits", impl, logits.device)
    sparse = _check(logits, targets, pos_weight, reduction, normalizer, grad_scale)
    if logits.stride(1) != 1 and not inplace_grad:
        logits = logits.contiguous()
    targets = targets if targets.shape[1] <= 1 or targets.stride(1) == 1 else targets.contiguous()
    pos_weight = None if pos_weight is None else pos_weight.float().contiguous()
    words = None if stats is None else stats.bind(*logits.shape, logits.device)
    if is_compiling() and not inplace_grad:
        return compiled_bce(logits, targets, sparse, pos_weight, reduction, normalizer, grad_scale, words, choice)
    job = BceJob(choice, targets, sparse, pos_weight, loss_factor(logits, reduction, normalizer), grad_scale, words)
    return fused_loss(logits, job, inplace_grad=inplace_grad, factor_given=grad_scale is not None)


def _check(logits, targets, pos_weight, reduction, normalizer, grad_scale) -> bool:
    """Raise on misuse; return whether the targets are sparse."""
    op = "bce_with_logits"
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must have shape (T, L) with L >= 1, got {tuple(logits.shape)}")
    sparse = targets.dtype == torch.int64
    if not sparse and targets.dtype not in (*FLOAT_DTYPES, torch.bool):
        raise TypeError(f"{op}: targets must be floating or bool (dense) or int64 (sparse), got {str(targets.dtype)[6:]}")
    if targets.dim() != 2 or targets.shape[0] != logits.shape[0]:
        raise ValueError(f"{op}: targets must have shape ({logits.shape[0]}, ...), got {tuple(targets.shape)}")
    if not sparse and targets.shape != logits.shape:
        raise ValueError(f"{op}: dense targets must have shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if pos_weight is not None and pos_weight.shape != logits.shape[1:]:
        raise ValueError(f"{op}: pos_weight must have shape ({logits.shape[1]},), got {tuple(pos_weight.shape)}")
    check_same_device(op, logits.device, targets=targets, pos_weight=pos_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if reduction == "sum" and normalizer is not None:
        raise ValueError(f"{op}: normalizer divides a mean; reduction is 'sum'")
    if isinstance(normalizer, (int, float)) and not normalizer > 0:
        raise ValueError(f"{op}: normalizer must be positive, got {normalizer}")
    check_device_scalar(op, "normalizer", normalizer, logits.device)
    check_device_scalar(op, "grad_scale", grad_scale, logits.device)
    return sparse
