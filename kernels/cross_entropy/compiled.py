"""cross_entropy inside `torch.compile`; see kernels/compiled_loss.py."""

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels import compiled_loss
from kernels.cross_entropy.job import CrossEntropyJob

_NAMES = ("ignore_index", "smoothing", "z_loss", "valid")
_library = torch.library.Library("dtype_dynamics_cross_entropy", "FRAGMENT")
_library.define(
    "compiled(Tensor logits, Tensor targets, Tensor? normalizer_at, float? normalizer, Tensor? grad_scale_at, "
    "float? grad_scale, Tensor? words, bool mean, bool make_grad, int ignore_index, float smoothing, float z_loss, "
    f"int valid, str impl) -> {compiled_loss.RETURNS}"
)
_library.define(
    "compiled_gradient(Tensor logits, Tensor targets, Tensor state, Tensor factor, int ignore_index, float smoothing, "
    "float z_loss, int valid, str impl) -> Tensor"
)


def compiled_cross_entropy(logits, targets, options, mean, normalizer, grad_scale, words, impl) -> torch.Tensor:
    """The loss, by one operator that the compiler sees whole."""
    make_grad = compiled_loss.gradient_in_forward(logits, grad_scale)
    normalizer, grad_scale = compiled_loss.tensor_or_number(normalizer), compiled_loss.tensor_or_number(grad_scale)
    loss, _, _, _, new_words = torch.ops.dtype_dynamics_cross_entropy.compiled(
        logits, targets, *normalizer, *grad_scale, words, mean, make_grad, **options, impl=impl
    )
    if words is not None:
        words.copy_(new_words)
    return loss


def _compiled(logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, words, mean, make_grad, *options):
    job = CrossEntropyJob(
        impl=options[4],
        targets=targets,
        options=dict(zip(_NAMES, options[:4], strict=True)),
        mean=mean,
        normalizer=normalizer if normalizer_at is None else normalizer_at,
        grad_scale=grad_scale if grad_scale_at is None else grad_scale_at,
        words=None,
    )
    return compiled_loss.run(job, logits, words, make_grad)


def _compiled_gradient(logits, targets, state, factor, *options):
    grad = compiled_loss.empty_gradient(logits)
    torch.ops.dtype_dynamics_cross_entropy.gradient(logits, targets, state if state.numel() else None, grad, factor, *options)
    return grad


_library.impl("compiled", _compiled, "CompositeExplicitAutograd")
_library.impl("compiled_gradient", _compiled_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("dtype_dynamics_cross_entropy::compiled", lib=_library)
def _fake(logits, targets, normalizer_at, normalizer, grad_scale_at, grad_scale, words, mean, make_grad, *options):
    state = (logits.shape[0], 2) if options[4] == "triton" and not make_grad else (0,)
    return compiled_loss.fake(logits, words, make_grad, state)


@torch.library.register_fake("dtype_dynamics_cross_entropy::compiled_gradient", lib=_library)
def _fake_gradient(logits, *rest):
    return compiled_loss.empty_gradient(logits)


def _keep(ctx, inputs, output):
    _, grad, state, factor, _ = output
    ctx.make_grad, ctx.options = inputs[8], inputs[9:]
    ctx.save_for_backward(*((grad,) if ctx.make_grad else (inputs[0], inputs[1], state, factor)))


def _backward(ctx, grad_output, *unused):
    if ctx.make_grad:
        grad = compiled_loss.scaled(ctx.saved_tensors[0], grad_output)
    else:
        logits, targets, state, factor = ctx.saved_tensors
        factor = grad_output.float() * factor
        grad = torch.ops.dtype_dynamics_cross_entropy.compiled_gradient(logits, targets, state, factor, *ctx.options)
    return grad, *[None] * 13


torch.library.register_autograd("dtype_dynamics_cross_entropy::compiled", _backward, setup_context=_keep, lib=_library)


_ops = torch.ops.dtype_dynamics_cross_entropy


@register_flop_formula([_ops.compiled, _ops.compiled_gradient])
def _no_model_flops(*args, **kwargs) -> int:
    """As in eager code."""
    return 0
