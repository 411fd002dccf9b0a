"""cross_entropy: the job that binds one call to an implementation, and the operators behind it."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import reference
from kernels.fused_loss import reciprocal, scalar, split_factor, sum_rows

_OPTIONS = "int ignore_index, float smoothing, float z_loss, int valid, str impl"
_library = torch.library.Library("dtype_dynamics_cross_entropy", "DEF")
_library.define(
    "rows(Tensor logits, Tensor targets, Tensor(a!)? grad, Tensor(b!) losses, Tensor(c!)? state, "
    f"Tensor? factor_scalar, float factor, Tensor(d!)? words, {_OPTIONS}) -> ()"
)
_library.define(f"gradient(Tensor logits, Tensor targets, Tensor? state, Tensor(a!) grad, Tensor factor, {_OPTIONS}) -> ()")


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
