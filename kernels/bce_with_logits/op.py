"""bce_with_logits: the public op, its checks, and the job that binds a call to an implementation."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.bce_with_logits import reference
from kernels.dispatch import FLOAT_DTYPES, check_device_scalar, check_float, check_same_device, resolve_impl
from kernels.fused_loss import fused_loss, reciprocal, scalar, split_factor, sum_rows
from kernels.logit_stats.accumulator import LogitStats

REDUCTIONS = ("mean", "sum", "label_sum")

_library = torch.library.Library("dtype_dynamics_bce", "DEF")
_library.define(
    "rows(Tensor logits, Tensor targets, Tensor(a!)? grad, Tensor(b!)? losses, Tensor? factor_scalar, float factor, "
    "Tensor(c!)? words, bool sparse, Tensor? pos_weight, str impl) -> ()"
)


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
    choice = resolve_impl("bce_with_logits", impl, logits.device)
    sparse = _check(logits, targets, pos_weight, reduction, normalizer, grad_scale)
    if logits.stride(1) != 1 and not inplace_grad:
        logits = logits.contiguous()
    job = BceJob(
        impl=choice,
        targets=targets if targets.shape[1] <= 1 or targets.stride(1) == 1 else targets.contiguous(),
        sparse=sparse,
        pos_weight=None if pos_weight is None else pos_weight.float().contiguous(),
        loss_factor=_loss_factor(logits, reduction, normalizer),
        grad_scale=grad_scale,
        words=None if stats is None else stats.bind(*logits.shape, logits.device),
    )
    return fused_loss(logits, job, inplace_grad=inplace_grad, factor_given=grad_scale is not None)


@dataclass
class BceJob:
    """One call, bound to "triton" or "torch"."""

    impl: str
    targets: torch.Tensor
    sparse: bool
    pos_weight: torch.Tensor | None
    loss_factor: float | torch.Tensor
    grad_scale: float | torch.Tensor | None
    words: torch.Tensor | None
    name: str = "bce_with_logits"

    def forward(self, logits, grad):
        self.grad_factor = self.loss_factor if self.grad_scale is None else scalar(self.grad_scale)
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        self._rows(logits, grad, losses, self.grad_factor, self.words)
        return sum_rows(losses, self.loss_factor, self.impl)

    def backward(self, logits, grad, grad_output):
        self._rows(logits, grad, None, grad_output.float() * self.grad_factor, None)

    def _rows(self, logits, grad, losses, factor, words):
        torch.ops.dtype_dynamics_bce.rows(
            logits, self.targets, grad, losses, *split_factor(factor), words, self.sparse, self.pos_weight, self.impl
        )


def _rows(logits, targets, grad, losses, factor_scalar, factor, words, sparse, pos_weight, impl) -> None:
    factor = factor if factor_scalar is None else factor_scalar
    options = {"sparse": sparse, "pos_weight": pos_weight}
    if impl == "torch":
        reference.rows(logits, targets, grad, losses, factor, words=words, **options)
    elif logits.shape[0]:
        from kernels.bce_with_logits import triton_kernel

        triton_kernel.launch(logits, targets, grad, losses, factor, words, **options)


_library.impl("rows", _rows, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_bce.rows)
def _no_model_flops(*args, **kwargs) -> int:
    """Model FLOPs are matmuls; torch counts 0 for its own loss too. The elementwise work is in `flops`."""
    return 0


def _loss_factor(logits, reduction, normalizer):
    if reduction == "sum":
        return 1.0
    if normalizer is not None:
        return reciprocal(normalizer)
    divisor = logits.numel() if reduction == "mean" else logits.shape[0]
    return 1.0 / divisor if divisor else float("inf")  # the mean of nothing is 0 * Inf = NaN, as in torch


def _check(logits, targets, pos_weight, reduction, normalizer, grad_scale) -> bool:
    """Raise on misuse; return whether the targets are sparse."""
    op = "bce_with_logits"
    check_float(op, "logits", logits)
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
