"""The definition of the cross-entropy ops, in plain torch, and what runs on a CPU.

`forward` works through the rows in chunks that stay in a cache, so that neither an fp32 copy of the
logits nor their log-softmax is ever whole. Loss and gradient of a chunk are the two fused kernels that eager torch
runs too: log_softmax and its backward. `small_cross_entropy` serves small logits (see small_loss.py) by
F.cross_entropy, with the factor of the gradient as class weights.
"""

import torch

from kernels.logit_stats.reference import BAD_TARGETS, accumulate
from kernels.small_loss import constant, is_usual_scalar, number, reachable, with_value

CHUNK_ELEMENTS = {"cpu": 2**19}  # 2 MB of fp32; elsewhere larger chunks keep the device busy
CHUNK_ELEMENTS_ELSEWHERE = 2**26
LOOK_FOR_IGNORED = 2**15  # elements beyond which leaving out half of the rows wins
_cross_entropy = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls
_MEAN, _SUM = 1, 2
_softmax_backward = torch.ops.aten._log_softmax_backward_data  # (hot, logp) -> hot - exp(logp) * sum(hot)


def forward(logits, targets, grad, factor, *, ignore_index, smoothing, z_loss, valid, counters):
    """Row losses, fp32 (T,). With `grad` (T, V), which may be `logits`, the gradient times `factor` too."""
    losses = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    keep, in_range = _classify(targets, ignore_index, valid)
    if counters is not None:
        counters[BAD_TARGETS] += 0 if in_range is None else (~in_range).sum()
        accumulate(counters, logits[:, :valid], keep, logits.shape[1])
    for pick in _chunks(logits.shape[0], valid, keep):
        z, logp, target = _chunk(logits, targets, pick, valid, in_range)
        loss = logp.gather(1, target).squeeze(1).neg_()
        if smoothing:
            loss = (1 - smoothing) * loss - smoothing * logp.mean(dim=1)
        if z_loss:
            loss += z_loss * z.logsumexp(dim=1).square()
        losses[pick] = _only(loss, keep, in_range, pick)
        if grad is not None:
            _write_gradient(grad, pick, z, logp, target, factor, keep, in_range, smoothing, z_loss, valid)
    if grad is not None:
        _zero_rest(grad, keep, valid)
    return losses


def _classify(targets, ignore_index, valid):
    """(keep, in_range), bool (T,) or None where it would be all true.

    A CPU can look: a target out of range raises. Elsewhere looking would sync: its row becomes NaN.
    """
    if targets.device.type == "cpu" and targets.numel():
        low, high = targets.aminmax()
        if low >= 0 and high < valid and not low <= ignore_index <= high:
            return None, None
    keep = targets != ignore_index
    in_range = ((targets >= 0) & (targets < valid)) | ~keep
    if targets.device.type != "cpu":
        return keep, in_range
    if not in_range.all():
        row = int((~in_range).int().argmax())
        raise IndexError(f"cross_entropy: target {int(targets[row])} in row {row} is out of range [0, {valid})")
    return (None if keep.all() else keep), None


def _chunks(rows, valid, keep):
    """Row selectors: slices, or on a CPU the rows that count (for masked LM, 15 % of them)."""
    on_cpu = keep is None or keep.device.type == "cpu"
    per = max(1, (CHUNK_ELEMENTS["cpu"] if on_cpu else CHUNK_ELEMENTS_ELSEWHERE) // valid)
    if on_cpu and keep is not None:
        picked = keep.nonzero().squeeze(1)
        return picked.split(per) if picked.numel() else ()
    return [slice(start, min(start + per, rows)) for start in range(0, rows, per)]


def _chunk(logits, targets, pick, valid, in_range):
    """fp32 logits of the valid columns, their log-softmax, and the targets, (rows, 1)."""
    z = logits[pick][:, :valid].float()
    target = targets[pick].unsqueeze(1)
    return z, torch.log_softmax(z, dim=1), target if in_range is None else target.clamp(0, valid - 1)


def _only(x, keep, in_range, pick):
    """x of a chunk, 0 in ignored rows and NaN in rows whose target is out of range (elsewhere than on a CPU)."""
    if in_range is None:
        return x
    shape = (-1, *[1] * (x.dim() - 1))
    return x.masked_fill(~in_range[pick].view(shape), torch.nan).masked_fill(~keep[pick].view(shape), 0.0)


def _write_gradient(grad, pick, z, logp, target, factor, keep, in_range, smoothing, z_loss, valid):
    """grad[pick] = factor * ((1 + 2 c lse) p - (1 - eps) [target] - eps / V)."""
    hot = torch.full_like(logp, -smoothing / valid).mul_(factor) if smoothing else torch.zeros_like(logp)
    hot.scatter_add_(1, target, torch.full_like(logp[:, :1], smoothing - 1).mul_(factor))
    part = grad[pick] if isinstance(pick, slice) else None
    if part is not None and in_range is None and not z_loss and part.shape == z.shape and part.dtype == z.dtype:
        _softmax_backward.out(hot, logp, 1, torch.float32, out=part)  # z may be this memory; it is used no more
        return
    g = _softmax_backward(hot, logp, 1, torch.float32)
    if z_loss:
        g += logp.exp_().mul_((2 * z_loss * factor) * z.logsumexp(dim=1, keepdim=True))
    g = _only(g, keep, in_range, pick)
    if part is None:
        grad[:, :valid].index_copy_(0, pick, g.to(grad.dtype))
    else:
        part[:, :valid] = g


def _zero_rest(grad, keep, valid):
    """Zeros in the pad columns, and on a CPU in the ignored rows, which no chunk wrote."""
    if valid < grad.shape[1]:
        grad[:, valid:] = 0
    if keep is not None and grad.device.type == "cpu":
        grad[~keep] = 0


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
        accumulate(stats.bind(*logits.shape, logits.device), counted, keep, logits.shape[1])
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
