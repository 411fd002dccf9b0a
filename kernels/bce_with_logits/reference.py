"""The definition of the BCE ops, in plain torch; the implementation that runs on a CPU, in chunks that stay in a cache."""

import torch

from kernels.logit_stats import reference as logit_stats_reference

CHUNK_ELEMENTS = {"cpu": 2**18}  # 1 MB of fp32: a chunk has about five temporaries
CHUNK_ELEMENTS_ELSEWHERE = 2**26


def rows(logits, targets, grad, losses, factor, *, sparse, pos_weight, words):
    """Write row losses to `losses`, fp32 (T,), and the gradient times `factor` to `grad`; either may be None.

    targets  dense (T, L), or sparse int64 (T, K) with -1 as filler
    """
    count, width = logits.shape
    in_range = _check_sparse(targets, width, words) if sparse else None
    if words is not None:
        logit_stats_reference.accumulate(words, logits)
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


def _check_sparse(labels, width, words):
    """bool (T,): rows whose labels all are in range, or None (all of them; a CPU raises otherwise)."""
    bad = (labels < -1) | (labels >= width)
    if words is not None:
        words[5] += bad.sum()  # LogitStats.BAD_TARGETS
    if labels.device.type != "cpu":
        return ~bad.any(dim=1)
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        raise IndexError(f"bce_with_logits: label {int(labels[row, k])} in row {row} is out of range [0, {width})")
    return None
