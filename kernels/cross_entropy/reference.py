"""The definition of the cross-entropy ops, in plain torch; the implementation that runs on a CPU.

It works through the rows in chunks that stay in a cache, so that neither an fp32 copy of the
logits nor their log-softmax is ever whole. Loss and gradient of a chunk are the two fused
kernels that eager torch runs too: log_softmax and its backward.
"""

import torch

from kernels.logit_stats import reference as logit_stats_reference

CHUNK_ELEMENTS = {"cpu": 2**19}  # 2 MB of fp32; elsewhere larger chunks keep the device busy
CHUNK_ELEMENTS_ELSEWHERE = 2**26
_softmax_backward = torch.ops.aten._log_softmax_backward_data  # (hot, logp) -> hot - exp(logp) * sum(hot)


def forward(logits, targets, grad, factor, *, ignore_index, smoothing, z_loss, valid, words):
    """Row losses, fp32 (T,). With `grad` (T, V), which may be `logits`, the gradient times `factor` too."""
    losses = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    keep, in_range = _classify(targets, ignore_index, valid)
    if words is not None:
        words[5] += 0 if in_range is None else (~in_range).sum()  # LogitStats.BAD_TARGETS
        logit_stats_reference.accumulate(words, logits[:, :valid], keep, logits.shape[1])
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


def backward(logits, targets, grad, factor, *, ignore_index, smoothing, z_loss, valid):
    """The gradient times `factor`, alone."""
    keep, in_range = _classify(targets, ignore_index, valid)
    for pick in _chunks(logits.shape[0], valid, keep):
        z, logp, target = _chunk(logits, targets, pick, valid, in_range)
        _write_gradient(grad, pick, z, logp, target, factor, keep, in_range, smoothing, z_loss, valid)
    _zero_rest(grad, keep, valid)


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
