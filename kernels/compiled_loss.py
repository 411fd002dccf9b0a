"""The losses as torch's operators: in eager code one that writes rows, inside `torch.compile` a functional one, without a
graph break.

Autograd functions that keep state between forward and backward, and operators that mutate and have a gradient,
are what the compiler cannot take (a mutating operator refuses `register_autograd`). So there a loss is an operator
that returns all it makes: (loss, gradient, factor of the gradient, counters of the statistics), and the
counters are copied into the accumulator afterwards.

Other than in eager code, grad_output costs a pass over the gradient (the compiler may fuse it), and backward may run
twice. `inplace_grad` stays a graph break.
"""

from collections.abc import Callable

import torch

from kernels.dispatch import number_or_tensor, register
from kernels.fused_loss import LossCall, empty_gradient

_ARGUMENTS = (
    "Tensor logits, Tensor targets, Tensor? normalizer_at, float? normalizer, Tensor? grad_scale_at, float? grad_scale, "
    "Tensor? counters, str reduction, bool make_grad"
)
_ROWS = (
    "Tensor logits, Tensor targets, Tensor(a!)? grad, Tensor(b!)? losses, Tensor? factor_at, float? factor, "
    "Tensor(c!)? counters"
)
_RETURNS = "(Tensor loss, Tensor grad, Tensor factor, Tensor counters)"
_COMMON = 9  # arguments before the loss's own options


def register_loss(
    library: torch.library.Library, call_of: type[LossCall], options: dict[str, str], write_rows: Callable[..., None]
) -> Callable[[LossCall, torch.Tensor], torch.Tensor]:
    """Register `rows` of a loss, its operator in eager code, and `compiled` and `compiled_gradient`; return the function that
    takes a call through these two.

    options     name -> type in the operators' schema, of the loss's own options; the last argument is `impl`
    write_rows  (logits, targets, grad or None, losses or None, factor, counters or None, impl, **options)
    """
    schema = ", ".join(f"{kind} {name}" for name, kind in options.items()) + ", str impl"

    def rows(logits, targets, grad, losses, factor_at, factor, counters, *values) -> None:
        *own_values, impl = values
        if impl == "torch" or logits.shape[0]:
            factor, own = factor if factor_at is None else factor_at, dict(zip(options, own_values, strict=True))
            write_rows(logits, targets, grad, losses, factor, counters, impl, **own)

    def again(targets, reduction, normalizer, grad_scale, values) -> LossCall:
        *values, impl = values
        return call_of(impl, targets, reduction, normalizer, grad_scale, None, dict(zip(options, values, strict=True)))

    def run(logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, counters, reduction, make_grad, *values):
        """Nothing of what it returns shares memory with an argument."""
        normalizer = normalizer if normalizer_at is None else normalizer_at
        call = again(targets, reduction, normalizer, grad_scale if grad_scale_at is None else grad_scale_at, values)
        call.counters = None if counters is None else counters.clone()
        grad = empty_gradient(logits) if make_grad else logits.new_empty(0)
        loss = call.forward(logits, grad if make_grad else None)
        factor = call.grad_factor
        factor = factor.clone() if isinstance(factor, torch.Tensor) else torch.full((), factor, device=logits.device)
        return loss, grad, factor, logits.new_empty(0, dtype=torch.int64) if counters is None else call.counters

    def fake(logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, counters, reduction, make_grad, *values):
        """What `run` returns, by shape alone."""
        return (
            logits.new_empty((), dtype=torch.float32),
            empty_gradient(logits) if make_grad else logits.new_empty(0),
            logits.new_empty((), dtype=torch.float32),
            logits.new_empty(0, dtype=torch.int64) if counters is None else torch.empty_like(counters),
        )

    def run_gradient(logits, targets, factor, *values):
        grad = empty_gradient(logits)
        again(targets, "sum", None, None, values).write_rows(logits, grad, None, factor, None)
        return grad

    def keep(ctx, inputs, output):
        """What backward needs. Tensors among the options go through `save_for_backward` as well."""
        _, grad, factor, _ = output
        ctx.make_grad, values = inputs[_COMMON - 1], inputs[_COMMON:]
        ctx.tensors_at = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        ctx.values = [None if i in ctx.tensors_at else value for i, value in enumerate(values)]
        tensors = [values[i] for i in ctx.tensors_at]
        ctx.save_for_backward(*([grad] if ctx.make_grad else [inputs[0], inputs[1], factor, *tensors]))

    def backward(ctx, grad_output, *unused):
        nothing = [None] * (_COMMON + len(options))  # for every argument but the logits
        if ctx.make_grad:
            (grad,) = ctx.saved_tensors
            return (grad.float() * grad_output).to(grad.dtype), *nothing
        logits, targets, factor, *tensors = ctx.saved_tensors
        values = list(ctx.values)
        for i, tensor in zip(ctx.tensors_at, tensors, strict=True):
            values[i] = tensor
        return compiled_gradient(logits, targets, grad_output.float() * factor, *values), *nothing

    call_of.operator = register(library, f"rows({_ROWS}, {schema}) -> ()", rows, fake=None)
    compiled = register(library, f"compiled({_ARGUMENTS}, {schema}) -> {_RETURNS}", run, fake)
    torch.library.register_autograd(f"{library.ns}::compiled", backward, setup_context=keep, lib=library)
    compiled_gradient = register(
        library,
        f"compiled_gradient(Tensor logits, Tensor targets, Tensor factor, {schema}) -> Tensor",
        run_gradient,
        lambda logits, *rest: empty_gradient(logits),
    )

    def take(call: LossCall, logits: torch.Tensor) -> torch.Tensor:
        """The loss, by one operator that the compiler sees whole. As in eager code, fp16 without grad_scale is deferred."""
        wants_grad = torch.is_grad_enabled() and logits.requires_grad
        make_grad = wants_grad and (call.grad_scale is not None or logits.dtype != torch.float16)
        loss, _, _, counters = compiled(
            logits, call.targets, *number_or_tensor(call.normalizer), *number_or_tensor(call.grad_scale), call.counters,
            call.reduction, make_grad, *call.options.values(), call.impl,
        )  # fmt: skip
        if call.counters is not None:
            call.counters.copy_(counters)
        return loss

    return take
