"""cross_entropy: the public op, its checks, and the job that binds a call to an implementation."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import reference
from kernels.dispatch import check_device_scalar, check_float, check_same_device, resolve_impl
from kernels.fused_loss import fused_loss, reciprocal, scalar, split_factor, sum_rows
from kernels.logit_stats.accumulator import LogitStats

MAX_WIDTH = 262_144

_OPTIONS = "int ignore_index, float smoothing, float z_loss, int valid, str impl"
_library = torch.library.Library("dtype_dynamics_cross_entropy", "DEF")
_library.define(
    "rows(Tensor logits, Tensor targets, Tensor(a!)? grad, Tensor(b!) losses, Tensor(c!)? state, "
    f"Tensor? factor_scalar, float factor, Tensor(d!)? words, {_OPTIONS}) -> ()"
)
_library.define(f"gradient(Tensor logits, Tensor targets, Tensor? state, Tensor(a!) grad, Tensor factor, {_OPTIONS}) -> ()")


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
    RuntimeError: inplace_grad without a gradient wanted; a second backward of a gradient made in forward.
    """
    choice = resolve_impl("cross_entropy", impl, logits.device)
    valid = logits.shape[-1] if valid_vocab is None else valid_vocab
    _check(logits, targets, valid, label_smoothing, reduction, normalizer, grad_scale)
    if logits.stride(1) != 1 and not inplace_grad:
        logits = logits.contiguous()
    job = CrossEntropyJob(
        impl=choice,
        targets=targets.contiguous(),
        options={"ignore_index": ignore_index, "smoothing": label_smoothing, "z_loss": z_loss, "valid": valid},
        mean=reduction == "mean",
        normalizer=normalizer,
        grad_scale=grad_scale,
        words=None if stats is None else stats.bind(*logits.shape, logits.device),
    )
    return fused_loss(logits, job, inplace_grad=inplace_grad, factor_given=grad_scale is not None)


@dataclass
class CrossEntropyJob:
    """One call, bound to "triton" or "torch"; keeps the row state between a deferred forward and its backward."""

    impl: str
    targets: torch.Tensor
    options: dict
    mean: bool
    normalizer: int | float | torch.Tensor | None
    grad_scale: float | torch.Tensor | None
    words: torch.Tensor | None
    name: str = "cross_entropy"
    state: torch.Tensor | None = None

    def forward(self, logits, grad):
        loss_factor = self._loss_factor()
        self.grad_factor = loss_factor if self.grad_scale is None else scalar(self.grad_scale)
        rows = logits.shape[0]
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        if self.impl == "triton" and grad is None:
            self.state = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
        pointer, number = split_factor(self.grad_factor)
        torch.ops.dtype_dynamics_cross_entropy.rows(
            logits, self.targets, grad, losses, self.state, pointer, number, self.words, **self.options, impl=self.impl
        )
        return sum_rows(losses, loss_factor, self.impl)

    def backward(self, logits, grad, grad_output):
        factor = grad_output.float() * self.grad_factor
        torch.ops.dtype_dynamics_cross_entropy.gradient(
            logits, self.targets, self.state, grad, factor, **self.options, impl=self.impl
        )

    def _loss_factor(self):
        if not self.mean:
            return 1.0
        if self.normalizer is not None:
            return reciprocal(self.normalizer)
        ignore_index = self.options["ignore_index"]
        if self.impl == "torch":
            return (self.targets != ignore_index).sum().float().reciprocal()
        from kernels import fused_loss_kernel

        out = torch.empty((), dtype=torch.float32, device=self.targets.device)
        fused_loss_kernel.launch_inverse_count(self.targets, out, ignore_index)
        return out


def _rows(logits, targets, grad, losses, state, factor_scalar, factor, words, *options) -> None:
    *numbers, impl = options
    options = dict(zip(("ignore_index", "smoothing", "z_loss", "valid"), numbers, strict=True))
    factor = factor if factor_scalar is None else factor_scalar
    if impl == "torch":
        losses.copy_(reference.forward(logits, targets, grad, factor, words=words, **options))
    elif logits.shape[0]:
        from kernels.cross_entropy import triton_kernel

        triton_kernel.launch_rows(logits, targets, grad, losses, state, factor, words, **options)


def _gradient(logits, targets, state, grad, factor, *options) -> None:
    *numbers, impl = options
    options = dict(zip(("ignore_index", "smoothing", "z_loss", "valid"), numbers, strict=True))
    if impl == "torch":
        reference.backward(logits, targets, grad, factor, **options)
    elif logits.shape[0]:
        from kernels.cross_entropy import triton_kernel

        triton_kernel.launch_gradient(logits, targets, state, grad, factor, **options)


_library.impl("rows", _rows, "CompositeExplicitAutograd")
_library.impl("gradient", _gradient, "CompositeExplicitAutograd")


@register_flop_formula([torch.ops.dtype_dynamics_cross_entropy.rows, torch.ops.dtype_dynamics_cross_entropy.gradient])
def _no_model_flops(*args, **kwargs) -> int:
    """Model FLOPs are matmuls; torch counts 0 for its own loss too. The elementwise work is in `flops`."""
    return 0


def _check(logits, targets, valid, label_smoothing, reduction, normalizer, grad_scale):
    op = "cross_entropy"
    check_float(op, "logits", logits)
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
