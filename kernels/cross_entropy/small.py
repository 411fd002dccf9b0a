"""cross_entropy for small logits on a CPU (see kernels/small_loss.py): F.cross_entropy with the factor as class weights."""

import torch

from kernels.logit_stats import reference as logit_stats_reference
from kernels.small_loss import constant, is_usual_scalar, number, reachable, with_value

LOOK_FOR_IGNORED = 2**15  # elements beyond which leaving out half of the rows wins
_cross_entropy = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls
_MEAN, _SUM = 1, 2


def _is_usual(logits, targets, valid, label_smoothing, z_loss, reduction, normalizer, grad_scale) -> bool:
    """Whether nothing is wrong or rare: the full checks, which put messages together, are for the others."""
    rows, width = logits.shape
    return (
        targets.dtype is torch.int64
        and targets.is_cpu
        and targets.dim() == 1
        and len(targets) == rows
        and 1 <= valid <= width
        and z_loss == 0
        and 0.0 <= label_smoothing <= 1.0
        and (reduction == "mean" or (reduction == "sum" and normalizer is None))
        and (normalizer is None or is_usual_scalar(normalizer))
        and (grad_scale is None or is_usual_scalar(grad_scale))
    )


def small_cross_entropy(
    logits, targets, valid, ignore_index, label_smoothing, z_loss, reduction, normalizer, grad_scale, stats
):
    """The loss, or None where the chunked route has to serve (and raise, where something is wrong)."""
    valid = logits.shape[1] if valid is None else valid
    if not _is_usual(logits, targets, valid, label_smoothing, z_loss, reduction, normalizer, grad_scale):
        return None
    keep = None
    if targets.min().item() <= ignore_index:  # else none is ignored
        keep = targets != ignore_index
        if _chunks_serve_better(logits, keep):
            return None
    z = logits if valid == logits.shape[1] else logits[:, :valid]
    z = z if z.dtype is torch.float32 else z.float()
    try:
        if normalizer is None and grad_scale is None:
            loss = _cross_entropy(z, targets, None, _MEAN if reduction == "mean" else _SUM, ignore_index, label_smoothing)
        else:
            loss = _with_factors(z, targets, ignore_index, label_smoothing, reduction, normalizer, grad_scale)
    except IndexError:
        return None
    if loss is not None and stats is not None:
        counted = logits if valid == logits.shape[1] else logits.detach()[:, :valid]
        logit_stats_reference.accumulate(stats.bind(*logits.shape, logits.device), counted, keep, logits.shape[1])
    return loss


def _chunks_serve_better(logits, keep) -> bool:
    """Where leaving the ignored rows out saves time, or where they hold what 0 times is not 0."""
    kept = int(keep.sum())
    if logits.numel() > LOOK_FOR_IGNORED and 2 * kept < len(keep):
        return True
    return kept < len(keep) and not logits.detach().sum(dtype=torch.float32).isfinite().item()


def _with_factors(z, targets, ignore_index, label_smoothing, reduction, normalizer, grad_scale):
    """A factor as class weights multiplies each row's loss and gradient exactly, and costs no node of the graph."""
    if reduction == "sum":
        loss_factor = 1.0
    elif normalizer is None:
        count = int((targets != ignore_index).sum())
        loss_factor = 1.0 / count if count else torch.inf
    else:
        loss_factor = 1.0 / number(normalizer)
    grad_factor = loss_factor if grad_scale is None else number(grad_scale)
    if not reachable(loss_factor, grad_factor):
        return None
    weights = constant(grad_factor, z.shape[1])
    return with_value(_cross_entropy(z, targets, weights, _SUM, ignore_index, label_smoothing), loss_factor, grad_factor)
