"""The losses inside `torch.compile`: one functional operator each, without a graph break.

Autograd functions that keep state between forward and backward, and operators that mutate and have a gradient,
are what the compiler cannot take (a mutating operator refuses `register_autograd`). So there a loss is an operator
that returns all it makes: (loss, gradient, row state, factor of the gradient, words of the statistics), and the words
are copied into the accumulator afterwards. Each loss has its own `compiled.py`; this file holds what they share.

Other than in eager code, grad_output costs a pass over the gradient (the compiler may fuse it), and backward may run
twice. `inplace_grad` stays a graph break.
"""

import torch

from kernels.fused_loss import LossJob, empty_gradient

RETURNS = "(Tensor loss, Tensor grad, Tensor state, Tensor factor, Tensor words)"


def gradient_in_forward(logits: torch.Tensor, grad_scale) -> bool:
    """Whether the operator makes the gradient along with the loss; else backward does, as for fp16 in eager code."""
    return torch.is_grad_enabled() and logits.requires_grad and (grad_scale is not None or logits.dtype != torch.float16)


def tensor_or_number(x) -> tuple[torch.Tensor | None, float | None]:
    """The two arguments that carry a factor into an operator."""
    return (x, None) if isinstance(x, torch.Tensor) else (None, None if x is None else float(x))


def run(job: LossJob, logits: torch.Tensor, words: torch.Tensor | None, make_grad: bool) -> tuple[torch.Tensor, ...]:
    """All that the operator returns; nothing of it shares memory with an argument."""
    job.words = None if words is None else words.clone()
    grad = empty_gradient(logits) if make_grad else logits.new_empty(0)
    loss = job.forward(logits, grad if make_grad else None)
    state = getattr(job, "state", None)
    factor = job.grad_factor
    factor = factor.clone() if isinstance(factor, torch.Tensor) else torch.full((), factor, device=logits.device)
    return (
        loss,
        grad,
        logits.new_empty(0, dtype=torch.float32) if state is None else state,
        factor,
        logits.new_empty(0, dtype=torch.int64) if job.words is None else job.words,
    )


def fake(logits: torch.Tensor, words: torch.Tensor | None, make_grad: bool, state_shape: tuple) -> tuple[torch.Tensor, ...]:
    """What `run` returns, by shape alone."""
    return (
        logits.new_empty((), dtype=torch.float32),
        empty_gradient(logits) if make_grad else logits.new_empty(0),
        logits.new_empty(state_shape, dtype=torch.float32),
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(0, dtype=torch.int64) if words is None else torch.empty_like(words),
    )


def scaled(grad: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """grad * grad_output, in fp32 and rounded once."""
    return (grad.float() * grad_output).to(grad.dtype)
