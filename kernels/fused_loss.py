"""The autograd protocol of a loss whose gradient is made in the forward pass when that saves a read.

A loss subclasses `LossCall`; `fused_loss` decides *when* the gradient is made:

    fused     forward writes factor * dloss/dlogits, rounded once. backward hands it out, multiplied
              on the device by grad_output (the kernel leaves at once when that is 1; the host never looks).
    deferred  forward makes the loss only; backward goes over the rows once more and multiplies by
              grad_output *before* rounding. For fp16 without `grad_scale`: there 1/N alone would push
              almost every gradient below 2^-24, and a loss scale that arrives with grad_output is too late.

Either way the gradient exists once: a fused or in-place loss can go backward one time only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.dispatch import check_device_scalar, number_or_tensor


@dataclass
class LossCall:
    """One call of a loss: its arguments, bound to "triton" or "torch". A loss is a subclass.

    normalizer, grad_scale  numbers, one-element tensors or None, as the public op takes them
    counters                of the current slot of a LogitStats, or None
    options                 keyword arguments of the loss's own operators
    """

    impl: str
    targets: torch.Tensor
    reduction: str
    normalizer: int | float | torch.Tensor | None
    grad_scale: int | float | torch.Tensor | None
    counters: torch.Tensor | None
    options: dict

    name = "loss"
    operator: ClassVar[Callable]
    """Its registered operator (compiled_loss.py), under which a call of it is known to torch."""

    def forward(self, logits: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        """Return the loss, fp32 (); when `grad` is given, write the gradient there (it may be `logits` itself)."""
        factor = self._loss_factor(logits)
        self.grad_factor = factor if self.grad_scale is None else scalar(self.grad_scale)
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        self.write_rows(logits, grad, losses, self.grad_factor, self.counters)
        return sum_rows(losses, factor, self.impl)

    def _loss_factor(self, logits: torch.Tensor) -> float | torch.Tensor:
        if self.reduction == "sum":
            return 1.0
        return self.default_factor(logits) if self.normalizer is None else reciprocal(self.normalizer)

    def default_factor(self, logits: torch.Tensor) -> float | torch.Tensor:
        """One over the divisor of a mean without `normalizer`."""
        raise NotImplementedError

    def write_rows(self, logits, grad, losses, factor: float | torch.Tensor, counters: torch.Tensor | None) -> None:
        """Write the row losses, fp32 (rows,), and the gradient times `factor`; either may be None."""
        self.operator(
            logits, self.targets, grad, losses, *number_or_tensor(factor), counters, *self.options.values(), self.impl
        )


def check_factors(op: str, reduction: str, reductions: tuple[str, ...], normalizer, grad_scale, device: torch.device) -> None:
    """The arguments that divide and scale a loss, or ValueError and TypeError say what is wrong."""
    if reduction not in reductions:
        raise ValueError(f"{op}: reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if reduction == "sum" and normalizer is not None:
        raise ValueError(f"{op}: normalizer divides a mean; reduction is 'sum'")
    if isinstance(normalizer, (int, float)) and not normalizer > 0:
        raise ValueError(f"{op}: normalizer must be positive, got {normalizer}")
    check_device_scalar(op, "normalizer", normalizer, device)
    check_device_scalar(op, "grad_scale", grad_scale, device)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, call, inplace_grad, fused):
        ctx.call, ctx.inplace_grad, ctx.fused, ctx.spent = call, inplace_grad, fused, False
        data = logits.detach()
        ctx.grad = None
        if not fused:
            ctx.save_for_backward(logits)
            return call.forward(data, None)
        ctx.grad = data if inplace_grad else empty_gradient(data)
        loss = call.forward(data, ctx.grad)
        if inplace_grad:
            # Kernels write through raw pointers and autograd does not notice. Whoever saved these
            # logits for backward must fail, not read gradients in their place.
            torch.autograd.graph.increment_version(logits)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.call.name}: second backward: the gradient was computed "
                f"{'in place of the logits' if ctx.inplace_grad else 'in the forward pass'} and is already handed out"
            )
        ctx.spent = ctx.fused or ctx.inplace_grad
        if ctx.fused:
            grad, ctx.grad = ctx.grad, None
            scale_rows(grad, grad_output, ctx.call.impl)
            return grad, None, None, None
        (logits,) = ctx.saved_tensors
        data = logits.detach()
        grad = data if ctx.inplace_grad else empty_gradient(data)
        ctx.call.write_rows(data, grad, None, grad_output.float() * ctx.call.grad_factor, None)
        if ctx.inplace_grad:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None


def empty_gradient(data: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of data's shape and dtype. Padded, aligned rows stay so: kernels write 128 bits there."""
    rows, width = data.shape
    stride = data.stride(0)
    padded = stride % 16 == 0 and width < stride < width + 128
    buffer = torch.empty((rows, stride if padded else width), dtype=data.dtype, device=data.device)
    return buffer[:, :width]


def fused_loss(logits: torch.Tensor, call: LossCall, *, inplace_grad: bool, compiled: Callable) -> torch.Tensor:
    """The loss of `call` as an fp32 scalar with a gradient for `logits` (rows, columns).

    compiled  its operator under torch.compile (compiled_loss.py), where only `inplace_grad` is a graph break
    """
    if not torch.compiler.is_compiling():
        return _fused_loss(logits, call, inplace_grad)
    if not inplace_grad:
        return compiled(call, logits)
    # Not a decorator: `torch.compiler.disable` imports the whole compiler, a second for those who never compile.
    return torch.compiler.disable(_fused_loss)(logits, call, inplace_grad)


def _fused_loss(logits: torch.Tensor, call: LossCall, inplace_grad: bool) -> torch.Tensor:
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace_grad:
        _check_inplace(call.name, logits, wants_grad)
    if not wants_grad:
        return call.forward(logits.detach(), None)
    fused = call.grad_scale is not None or logits.dtype != torch.float16  # a given factor keeps fp16 from underflow
    return _FusedLoss.apply(logits, call, inplace_grad, fused)


def _check_inplace(name: str, logits: torch.Tensor, wants_grad: bool) -> None:
    if not wants_grad:
        raise RuntimeError(f"{name}: inplace_grad would overwrite the logits, and no gradient is wanted (no_grad?)")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"{name}: inplace_grad needs contiguous columns, got strides {logits.stride()}")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"{name}: inplace_grad needs rows that do not overlap, got strides {logits.stride()}")


def scalar(x: int | float | torch.Tensor) -> float | torch.Tensor:
    """A number as float, a one-element tensor as an fp32 scalar on its own device: the two kinds of factor."""
    return x.detach().reshape(()).float() if isinstance(x, torch.Tensor) else float(x)


def reciprocal(x: int | float | torch.Tensor) -> float | torch.Tensor:
    """1/x of the same kind, without a sync."""
    x = scalar(x)
    return 1.0 / x if isinstance(x, float) else x.reciprocal()


def sum_rows(losses: torch.Tensor, factor: float | torch.Tensor, impl: str) -> torch.Tensor:
    """factor * sum of the row losses, fp32 (), added up in fp64 in a fixed order."""
    if impl == "torch":
        return (losses.double().sum() * factor).float()
    from kernels import fused_loss_kernel

    loss = torch.empty((), dtype=torch.float32, device=losses.device)
    fused_loss_kernel.launch_sum(losses, loss, factor)
    return loss


def scale_rows(grad: torch.Tensor, grad_output: torch.Tensor, impl: str) -> None:
    """grad *= grad_output in fp32, rounded once, and without a pass over memory when it is 1."""
    if impl == "triton":
        from kernels import fused_loss_kernel

        if grad.numel():
            fused_loss_kernel.launch_scale(grad, grad_output)
    elif grad.device.type != "cpu" or grad_output.item() != 1.0:  # on a CPU, looking is no sync
        for rows in grad.split(max(1, 2**22 // max(1, grad.shape[1]))):
            rows.copy_(rows.float() * grad_output)
