"""cross_entropy: the public op, its checks, and the way a call takes."""

import torch
from torch.compiler import is_compiling

from kernels.cross_entropy.compiled import compiled_cross_entropy
from kernels.cross_entropy.job import CrossEntropyJob
from kernels.cross_entropy.small import small_cross_entropy
from kernels.dispatch import check_device_scalar, check_float, check_same_device, resolve_impl
from kernels.fused_loss import fused_loss
from kernels.logit_stats.accumulator import LogitStats
from kernels.small_loss import is_small

MAX_WIDTH = 262_144


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: int | float | torch.Tensor | None = None,
    grad_scale: float | torch.Tensor | None = None,
    valid_vocab: int | None = None,
    stats: LogitStats | None = None,
    inplace_grad: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax cross-entropy, fp32 (), with logit statistics and the gradient in one pass.

    logits           (T, V) fp32, bf16 or fp16, V <= 262,144; row stride free, columns contiguous (others are copied)
    targets          (T,) int64: a column below valid_vocab, or ignore_index (loss and gradient 0)
    label_smoothing  e in [0, 1]: the target is (1 - e) one-hot plus e / V on every valid column
    z_loss           weight of lse^2, added to each row's loss
    reduction        "sum", or "mean": the sum over `normalizer`, by default over the targets not ignored (0: NaN)
    normalizer       number or device scalar, with "mean" only: the targets of a whole accumulation step
    grad_scale       number or device scalar: *replaces* 1/normalizer in the gradient, so it is the loss scale times
                     1/normalizer; the loss is not scaled. dlogits = grad_scale * d(sum)/dlogits * grad_output, with
                     grad_scale multiplied in before the gradient is rounded. Call `loss.backward()`, not
                     `scaler.scale(loss).backward()`, which would scale twice. Without it, fp16 gradients are made
                     in the backward pass, where grad_output is known, and are just as exact for one more read.
    valid_vocab      columns from here on are padding: no part in loss, statistics or gradient (0)
    stats            a LogitStats: statistics of the rows not ignored, and a count of targets out of range
    inplace_grad     overwrite the logits with their gradient; anyone else who saved them fails in backward

    A target out of range raises IndexError at once on a CPU (impl "torch"); elsewhere its row's loss and
    gradient are NaN and `stats.read()` raises IndexError. Never syncs on CUDA. Deterministic: row losses are
    summed in a fixed order in fp64, statistics are exact. TypeError, ValueError: dtype, shape, device, options.
    RuntimeError: inplace_grad without a gradient wanted; a second backward of a gradient made in forward. Small logits
    on a CPU get eager torch's loss and gradient (small_loss.py). One graph under torch.compile, but for inplace_grad.
    """
    if is_small(logits, impl, inplace_grad):
        loss = small_cross_entropy(
            logits, targets, valid_vocab, ignore_index, label_smoothing, z_loss, reduction, normalizer, grad_scale, stats
        )
        if loss is not None:
            return loss
    check_float("cross_entropy", "logits", logits)
    choice = resolve_impl("cross_entropy", impl, logits.device)
    valid = logits.shape[-1] if valid_vocab is None and logits.dim() else valid_vocab
    _check(logits, targets, valid, label_smoothing, reduction, normalizer, grad_scale)
    if logits.stride(1) != 1 and not inplace_grad:
        logits = logits.contiguous()
    targets, mean = targets.contiguous(), reduction == "mean"
    options = {"ignore_index": ignore_index, "smoothing": float(label_smoothing), "z_loss": float(z_loss), "valid": valid}
    words = None if stats is None else stats.bind(*logits.shape, logits.device)
    if is_compiling() and not inplace_grad:
        return compiled_cross_entropy(logits, targets, options, mean, normalizer, grad_scale, words, choice)
    job = CrossEntropyJob(choice, targets, options, mean, normalizer, grad_scale, words)
    return fused_loss(logits, job, inplace_grad=inplace_grad, factor_given=grad_scale is not None)


def _check(logits, targets, valid, label_smoothing, reduction, normalizer, grad_scale):
    op = "cross_entropy"
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must have shape (T, V) with V >= 1, got {tuple(logits.shape)}")
    if logits.shape[1] > MAX_WIDTH:
        raise ValueError(f"{op}: at most {MAX_WIDTH} columns, got {logits.shape[1]}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be int64, got {str(targets.dtype)[6:]}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"{op}: targets must have shape ({logits.shape[0]},), got {tuple(targets.shape)}")
    check_same_device(op, logits.device, targets=targets)
    if not 1 <= valid <= logits.shape[1]:
        raise ValueError(f"{op}: valid_vocab must be in [1, {logits.shape[1]}], got {valid}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if reduction == "sum" and normalizer is not None:
        raise ValueError(f"{op}: normalizer divides a mean; reduction is 'sum'")
    if isinstance(normalizer, (int, float)) and not normalizer > 0:
        raise ValueError(f"{op}: normalizer must be positive, got {normalizer}")
    check_device_scalar(op, "normalizer", normalizer, logits.device)
    check_device_scalar(op, "grad_scale", grad_scale, logits.device)
