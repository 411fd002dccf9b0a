"""Softmax cross-entropy over rows of logits, with logit statistics and the gradient in one pass.

The maths, for a row z with valid columns j < V, target t, label smoothing e and z-loss weight c:

    m   = max_j z_j                        S = sum_j exp(z_j - m)        lse = m + log S
    loss = (1 - e) (m - z_t) + e (m - mean_j z_j) + log S + c lse^2
    dloss/dz_j = (1 + 2 c lse) exp(z_j - m) / S - (1 - e) [j = t] - e / V

`exp(z_j - m) / S` and not `exp(z_j - lse)`: at fp16's 65,504 an fp32 lse has lost the
digits of log S. mean_j z_j is summed as differences from z_t for the same reason.
Rows whose target is `ignore_index` have loss and gradient 0, whatever they hold.

Memory traffic, counted by hand for T rows of V columns of b bytes: logits read once and
gradient written once from HBM, 2 T V b; the second reading of a row, for the gradient,
finds it in L1 or L2. Forward alone reads T V b; a deferred backward goes over the rows again, 2 T V b.
Extra memory: 4 bytes a row.
"""

import torch

from kernels.compiled_loss import register_loss
from kernels.cross_entropy import reference
from kernels.dispatch import check_float, check_same_device, resolve_impl
from kernels.fused_loss import LossCall, check_factors, fused_loss
from kernels.logit_stats import LogitStats
from kernels.small_loss import is_small

MAX_WIDTH = 262_144
ROW_BYTES = 8 + 4  # target read, row loss written
_library = torch.library.Library("dtype_dynamics_cross_entropy", "DEF")


def bytes_moved(rows: int, width: int, element_bytes: int, mode: str = "fused") -> int:
    """Device-memory bytes. mode: "fused" (loss and gradient), "forward" (loss), "backward" (deferred gradient)."""
    passes = {"fused": 2, "forward": 1, "backward": 2}[mode]
    return passes * rows * width * element_bytes + rows * ROW_BYTES


def flops(rows: int, width: int, mode: str = "fused") -> int:
    """Elementwise floating-point operations (an exponential counts as one). Not model FLOPs, which are matmuls only.

    forward: max, subtract, exp, add. Gradient: subtract, exp, multiply by 1/S.
    """
    return {"fused": 7, "forward": 4, "backward": 7}[mode] * rows * width


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
        loss = reference.small_cross_entropy(
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
    options = {"ignore_index": ignore_index, "smoothing": float(label_smoothing), "z_loss": float(z_loss), "valid": valid}
    counters = None if stats is None else stats.bind(logits.shape[0], logits.shape[1], logits.device)
    call = CrossEntropyCall(choice, targets.contiguous(), reduction, normalizer, grad_scale, counters, options)
    return fused_loss(logits, call, inplace_grad=inplace_grad, compiled=_compiled)


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
    check_factors(op, reduction, ("mean", "sum"), normalizer, grad_scale, logits.device)


class CrossEntropyCall(LossCall):
    """One call of cross_entropy. Options: ignore_index, smoothing, z_loss and valid (columns that are no padding)."""

    name = "cross_entropy"

    def default_factor(self, logits):
        """1 over the targets that are not ignored, on the device."""
        ignore_index = self.options["ignore_index"]
        if self.impl == "torch":
            return (self.targets != ignore_index).sum().float().reciprocal()
        from kernels import fused_loss_kernel

        out = torch.empty((), dtype=torch.float32, device=self.targets.device)
        fused_loss_kernel.launch_inverse_count(self.targets, out, ignore_index)
        return out


def _write_rows(logits, targets, grad, losses, factor, counters, impl, **options) -> None:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32) if losses is None else losses
    if impl == "torch":
        losses.copy_(reference.forward(logits, targets, grad, factor, counters=counters, **options))
    else:
        from kernels.cross_entropy import triton_kernel

        triton_kernel.launch(logits, targets, grad, losses, factor, counters, **options)


_OPTIONS = {"ignore_index": "int", "smoothing": "float", "z_loss": "float", "valid": "int"}
_compiled = register_loss(_library, CrossEntropyCall, _OPTIONS, _write_rows)
