"""logit_stats: the standalone pass, for losses computed in the model's own dtype."""

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import check_float, resolve_impl
from kernels.logit_stats import reference
from kernels.logit_stats.accumulator import LogitStats

_library = torch.library.Library("dtype_dynamics_logit_stats", "DEF")
_library.define("logit_stats(Tensor x, Tensor(a!) words, str impl) -> ()")


@torch.no_grad()
def logit_stats(x: torch.Tensor, stats: LogitStats, *, impl: str = "auto") -> None:
    """Fold `x` into the current slot of `stats`. No sync, no gradient.

    x      (..., width), fp32, bf16 or fp16; row stride free, columns contiguous (others are copied)
    stats  a LogitStats on x's device; rows are x's leading dimensions, flattened

    TypeError for another dtype, ValueError for a scalar, another device or another width
    than the slot already holds.
    """
    check_float("logit_stats", "x", x)
    if x.dim() == 0:
        raise ValueError("logit_stats: x must have at least one dimension")
    choice = resolve_impl("logit_stats", impl, x.device)
    x = x.detach().reshape(-1, x.shape[-1]) if x.numel() else x.detach().new_empty(0, x.shape[-1])
    words = stats.bind(*x.shape, x.device)
    if x.numel() == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    torch.ops.dtype_dynamics_logit_stats.logit_stats(x, words, choice)


def _run(x, words, impl) -> None:
    if impl == "torch":
        return reference.accumulate(words, x)
    from kernels.logit_stats import triton_kernel

    triton_kernel.launch(x, words)


@torch.library.register_fake("dtype_dynamics_logit_stats::logit_stats", lib=_library)
def _fake(x, words, impl) -> None:
    return None


_library.impl("logit_stats", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_logit_stats.logit_stats)
def _no_model_flops(*args, **kwargs) -> int:
    """Measuring is not the model's work: it adds nothing to model FLOPs."""
    return 0
