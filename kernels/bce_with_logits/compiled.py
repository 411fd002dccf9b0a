"""bce_with_logits inside `torch.compile`; see kernels/compiled_loss.py."""

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels import compiled_loss
from kernels.bce_with_logits.job import BceJob, loss_factor

_library = torch.library.Library("dtype_dynamics_bce", "FRAGMENT")
_library.define(
    "compiled(Tensor logits, Tensor targets, Tensor? normalizer_at, float? normalizer, Tensor? grad_scale_at, "
    "float? grad_scale, Tensor? words, str reduction, bool make_grad, bool sparse, Tensor? pos_weight, str impl) "
    f"-> {compiled_loss.RETURNS}"
)
_library.define(
    "compiled_gradient(Tensor logits, Tensor targets, Tensor factor, bool sparse, Tensor? pos_weight, str impl) -> Tensor"
)


def compiled_bce(logits, targets, sparse, pos_weight, reduction, normalizer, grad_scale, words, impl) -> torch.Tensor:
    """The loss, by one operator that the compiler sees whole."""
    make_grad = compiled_loss.gradient_in_forward(logits, grad_scale)
    normalizer, grad_scale = compiled_loss.tensor_or_number(normalizer), compiled_loss.tensor_or_number(grad_scale)
    loss, _, _, _, new_words = torch.ops.dtype_dynamics_bce.compiled(
        logits, targets, *normalizer, *grad_scale, words, reduction, make_grad, sparse, pos_weight, impl
    )
    if words is not None:
        words.copy_(new_words)
    return loss


def _compiled(
    logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, words, reduction, make_grad, sparse, pos_weight, impl
):
    job = BceJob(
        impl=impl,
        targets=targets,
        sparse=sparse,
        pos_weight=pos_weight,
        loss_factor=loss_factor(logits, reduction, normalizer if normalizer_at is None else normalizer_at),
        grad_scale=grad_scale if grad_scale_at is None else grad_scale_at,
        words=None,
    )
    return compiled_loss.run(job, logits, words, make_grad)


def _compiled_gradient(logits, targets, factor, sparse, pos_weight, impl):
    grad = compiled_loss.empty_gradient(logits)
    torch.ops.dtype_dynamics_bce.rows(logits, targets, grad, None, factor, 1.0, None, sparse, pos_weight, impl)
    return grad


_library.impl("compiled", _compiled, "CompositeExplicitAutograd")
_library.impl("compiled_gradient", _compiled_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("dtype_dynamics_bce::compiled", lib=_library)
def _fake(
    logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, words, reduction, make_grad, sparse, pos_weight, impl
):
    return compiled_loss.fake(logits, words, make_grad, (0,))


@torch.library.register_fake("dtype_dynamics_bce::compiled_gradient", lib=_library)
def _fake_gradient(logits, *rest):
    return compiled_loss.empty_gradient(logits)


def _keep(ctx, inputs, output):
    logits, targets, *_, make_grad, sparse, pos_weight, impl = inputs
    ctx.make_grad, ctx.sparse, ctx.impl = make_grad, sparse, impl
    ctx.save_for_backward(*((output[1],) if make_grad else (logits, targets, output[3], pos_weight)))


def _backward(ctx, grad_output, *unused):
    if ctx.make_grad:
        grad = compiled_loss.scaled(ctx.saved_tensors[0], grad_output)
    else:
        logits, targets, factor, pos_weight = ctx.saved_tensors
        factor = grad_output.float() * factor
        grad = torch.ops.dtype_dynamics_bce.compiled_gradient(logits, targets, factor, ctx.sparse, pos_weight, ctx.impl)
    return grad, *[None] * 11


torch.library.register_autograd("dtype_dynamics_bce::compiled", _backward, setup_context=_keep, lib=_library)


@register_flop_formula([torch.ops.dtype_dynamics_bce.compiled, torch.ops.dtype_dynamics_bce.compiled_gradient])
def _no_model_flops(*args, **kwargs) -> int:
    """As in eager code."""
    return 0
