"""bce_with_logits: the job that binds one call to an implementation, and the operators behind it."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.bce_with_logits import reference
from kernels.fused_loss import reciprocal, scalar, split_factor, sum_rows

_library = torch.library.Library("dtype_dynamics_bce", "DEF")
_library.define(
    "rows(Tensor logits, Tensor targets, Tensor(a!)? grad, Tensor(b!)? losses, Tensor? factor_scalar, float factor, "
    "Tensor(c!)? words, bool sparse, Tensor? pos_weight, str impl) -> ()"
)


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


@register_flop_formula([torch.ops.dtype_dynamics_bce.rows])
def _no_model_flops(*args, **kwargs) -> int:
    """Model FLOPs are matmuls; torch counts 0 for its own loss too. The elementwise work is in `flops`."""
    return 0


def loss_factor(logits, reduction, normalizer):
    if reduction == "sum":
        return 1.0
    if normalizer is not None:
        return reciprocal(normalizer)
    divisor = logits.numel() if reduction == "mean" else logits.shape[0]
    return 1.0 / divisor if divisor else float("inf")  # the mean of nothing is 0 * Inf = NaN, as in torch
