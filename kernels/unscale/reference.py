"""The definition, in torch's own operators: GradScaler's kernel, float64 statistics, clip_grad_norm_'s factor."""

import torch

from kernels.multi_tensor_stats.reference import reference_stats
from kernels.multi_tensor_stats.stats import TensorStats
from kernels.scale.reference import reference_scale_


def reference_unscale_(
    grads: list[torch.Tensor],
    out: TensorStats,
    inv_scale: torch.Tensor,
    underflow_below: float | torch.Tensor,
    max_norm: float | None,
    clip: bool,
) -> None:
    """Unscale `grads` in place, fill `out`, and with `clip` multiply by the factor. Slow, obvious, any device."""
    raw = [g.clone() for g in grads]
    found_inf = torch.zeros((), device=out.words.device)
    if grads:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale.float().reshape(()))
    reference_stats(grads, out, underflow_below, raw, max_norm)
    if clip:
        reference_scale_(grads, out.clip_factor)
