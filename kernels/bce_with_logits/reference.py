"""The definition of the BCE ops, in plain torch, and what runs on a CPU.

`rows` works in chunks that stay in a cache. `small_bce` serves small logits (see small_loss.py) by eager torch's own
loss, where that is finite.
"""

import math

import torch

from kernels.dispatch import FLOAT_DTYPES
from kernels.logit_stats.reference import BAD_TARGETS, accumulate
from kernels.small_loss import constant, is_usual_scalar, number, reachable, with_value

CHUNK_ELEMENTS = {"cpu": 2**18}  # 1 MB of fp32: a chunk has about five temporaries
CHUNK_ELEMENTS_ELSEWHERE = 2**26
_MEAN, _SUM = 1, 2


def rows(logits, targets, grad, losses, factor, *, sparse, pos_weight, counters):
    """Write row losses to `losses`, fp32 (T,), and the gradient times `factor` to `grad`; either may be None.

    targets  dense (T, L), or sparse int64 (T, K) with -1 as filler
    """
    count, width = logits.shape
    in_range = _check_sparse(targets, width, counters) if sparse else None
    if counters is not None:
        accumulate(counters, logits)
    per = max(1, CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS_ELSEWHERE) // width)
    for start in range(0, count, per):
        part = slice(start, min(start + per, count))
        x = logits[part].float()
        y = dense_targets(targets[part], width) if sparse else targets[part].float()
        bad = None if in_range is None else ~in_range[part].unsqueeze(1)
        if losses is not None:
            losses[part] = _mask(_loss(x, y, pos_weight), bad).sum(dim=1)
        if grad is not None:
            grad[part] = _mask(_gradient(x, y, pos_weight).mul_(factor), bad)


def _loss(x, y, pos_weight):
    """|x| (x > 0 ? 1 - y : w y) + log1p(exp(-|x|)) (1 - y + w y), with Inf times a zero target taken as 0."""
    s = torch.sigmoid(-x.abs())
    t = torch.log1p(-s).neg_()  # -log(1 - sigmoid(-|x|)) is log1p(exp(-|x|)), and a vectorised kernel less
    wy = y if pos_weight is None else y * pos_weight
    if x.device.type == "cpu" and s.numel() and s.amin() > 0:  # no infinity: `where` is slow on a CPU
        far = x.clamp_min(0.0)
        far = torch.addcmul(far, x, y, value=-1) if pos_weight is None else far * (1 - y) + (-x).clamp_min_(0.0) * wy
    else:
        wrong = torch.where(x > 0, 1 - y, wy)
        far = torch.where(wrong == 0, 0.0, x.abs() * wrong)
    return far.add_(t if pos_weight is None else t.mul_(1 - y + wy))


def _gradient(x, y, pos_weight):
    """(1 - y) sigmoid(x) - w y sigmoid(-x)."""
    if pos_weight is None:
        return torch.sigmoid(x).sub_(y)
    return torch.sigmoid(x).mul_(1 - y).sub_(torch.sigmoid(-x).mul_(y * pos_weight))


def _mask(x, bad):
    return x if bad is None else x.masked_fill_(bad, torch.nan)


def dense_targets(labels, width):
    """Label lists (T, K), filler -1, as 0/1 fp32 (T, width); a label given twice counts once."""
    labels = torch.where((labels >= 0) & (labels < width), labels, width)
    y = torch.zeros(labels.shape[0], width + 1, dtype=torch.float32, device=labels.device)
    return y.scatter_(1, labels, 1.0)[:, :width]


def _check_sparse(labels, width, counters):
    """bool (T,): rows whose labels all are in range, or None (all of them; a CPU raises otherwise)."""
    bad = (labels < -1) | (labels >= width)
    if counters is not None:
        counters[BAD_TARGETS] += bad.sum()
    if labels.device.type != "cpu":
        return ~bad.any(dim=1)
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        raise IndexError(f"bce_with_logits: label {int(labels[row, k])} in row {row} is out of range [0, {width})")
    return None


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
        accumulate(stats.bind(*logits.shape, logits.device), logits)
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
