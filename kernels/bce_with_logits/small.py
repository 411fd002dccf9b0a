"""bce_with_logits for small logits on a CPU (see kernels/small_loss.py): eager torch's, where the loss is finite."""

import math

import torch

from kernels.bce_with_logits.reference import dense_targets
from kernels.dispatch import FLOAT_DTYPES
from kernels.logit_stats import reference as logit_stats_reference
from kernels.small_loss import constant, is_usual_scalar, number, reachable, with_value

_MEAN, _SUM = 1, 2


def _is_usual(logits, targets, pos_weight, reduction, normalizer, grad_scale) -> bool:
    """Whether nothing is wrong or rare: the full checks, which put messages together, are for the others."""
    return (
        targets.is_cpu
        and _fit(logits, targets)
        and (pos_weight is None or (pos_weight.is_cpu and pos_weight.shape == logits.shape[1:]))
        and (reduction in ("mean", "label_sum") or (reduction == "sum" and normalizer is None))
        and (normalizer is None or is_usual_scalar(normalizer))
        and (grad_scale is None or is_usual_scalar(grad_scale))
    )


def _fit(logits, targets) -> bool:
    if targets.dtype is torch.int64:
        return targets.dim() == 2 and targets.shape[0] == logits.shape[0] and targets.shape[1] > 0
    return targets.shape == logits.shape and (targets.dtype in FLOAT_DTYPES or targets.dtype is torch.bool)


def small_bce(logits, targets, pos_weight, reduction, normalizer, grad_scale, stats):
    """The loss, or None where the other route has to serve: infinite logits, NaN, a label out of range, misuse."""
    if not _is_usual(logits, targets, pos_weight, reduction, normalizer, grad_scale):
        return None
    if targets.dtype is torch.int64:
        low, high = targets.aminmax()
        if low.item() < -1 or high.item() >= logits.shape[1]:
            return None
        targets = dense_targets(targets, logits.shape[1])
    x, y = logits.float(), targets.float()
    weight = None if pos_weight is None else pos_weight.float()
    if reduction == "mean" and normalizer is None and grad_scale is None:
        loss = torch.binary_cross_entropy_with_logits(x, y, None, weight, _MEAN)
    else:
        loss = _with_factors(x, y, weight, reduction, normalizer, grad_scale)
    if loss is None or not math.isfinite(loss.item()):
        return None
    if stats is not None:
        logit_stats_reference.accumulate(stats.bind(*logits.shape, logits.device), logits)
    return loss


def _with_factors(x, y, weight, reduction, normalizer, grad_scale):
    divisor = {"sum": 1, "mean": x.numel(), "label_sum": x.shape[0]}[reduction] if normalizer is None else number(normalizer)
    loss_factor = 1.0 / divisor
    grad_factor = loss_factor if grad_scale is None else number(grad_scale)
    if not reachable(loss_factor, grad_factor):
        return None
    loss = torch.binary_cross_entropy_with_logits(x, y, None, weight, _SUM)
    if loss_factor == grad_factor == 1.0:
        return loss
    # A tensor: a Python number costs twice the time of this multiplication and its backward.
    return with_value(loss * constant(grad_factor), loss_factor, grad_factor)
