"""The public op: checks, the choice of implementation, and the torch operator behind it."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import check_device_scalar, resolve_impl
from kernels.multi_tensor_stats.host import host_stats
from kernels.multi_tensor_stats.op import check_tensors, fitting_out, flat
from kernels.multi_tensor_stats.stats import UNDERFLOW_BELOW, TensorStats
from kernels.scale.op import increment_versions
from kernels.unscale.reference import reference_unscale_

_OP = "unscale_and_stats_"
_library = torch.library.Library("dtype_dynamics_unscale", "DEF")
_library.define(
    "unscale_and_stats_(Tensor(a!)[] grads, Tensor(b!) words, Tensor? inv_scale_at, float inv_scale, "
    "Tensor? below_at, float below, float? max_norm, bool clip, str impl) -> ()"
)


def unscale_and_stats_(
    grads: Sequence[torch.Tensor],
    inv_scale: float | torch.Tensor,
    *,
    out: TensorStats | None = None,
    max_norm: float | None = None,
    clip: bool = False,
    underflow_below: float | torch.Tensor = UNDERFLOW_BELOW,
    impl: str = "auto",
) -> TensorStats:
    """Multiply gradients by `inv_scale` in place, and measure them on the way. No host sync on CUDA.

    grads            fp32 or bf16, mixed; as for multi_tensor_stats otherwise
    inv_scale        1 / loss scale: a one-element float32 tensor on the device, or a number
    max_norm         the result's `clip_factor` is min(1, max_norm / (norm + 1e-6)); 1 without it
    clip             also multiply by `clip_factor`: 3 memory passes (2 without, and the factor is yours to apply)
    underflow_below  `below` counts gradients with 0 < |g| < this *before* unscaling

    Returns TensorStats of the unscaled, not yet clipped gradients, with `found_inf` (float32 0-d, 1 when a
    gradient was NaN or Inf before unscaling) and `clip_factor`. With found_inf the gradients are multiplied
    all the same, as in torch: skip the step.

    Raises TypeError for fp16 gradients, as GradScaler does: a gradient that fp16 could not hold is already lost
    when it is unscaled. multi_tensor_stats measures them. Other errors as there; ValueError for `clip` without
    `max_norm`. The gradients' autograd version counters are bumped. Deterministic.
    """
    grads = list(grads)
    for index, g in enumerate(grads):
        if isinstance(g, torch.Tensor) and g.dtype == torch.float16:
            raise TypeError(
                f"{_OP}: grads[{index}] is float16; a loss scaler unscales fp32 or bf16 gradients only (keep fp32 "
                "master weights; multi_tensor_stats measures fp16 gradients)"
            )
    device = grads[0].device if grads else (out.words.device if out is not None else torch.device("cpu"))
    check_tensors(_OP, grads, device)
    if clip and max_norm is None:
        raise ValueError(f"{_OP}: clip=True needs max_norm")
    out = fitting_out(_OP, out, len(grads), device)
    check_device_scalar(_OP, "inv_scale", inv_scale, device)
    check_device_scalar(_OP, "underflow_below", underflow_below, device)
    at, scale = (inv_scale, 1.0) if isinstance(inv_scale, torch.Tensor) else (None, float(inv_scale))
    below_at, below = (underflow_below, 0.0) if isinstance(underflow_below, torch.Tensor) else (None, float(underflow_below))
    torch.ops.dtype_dynamics_unscale.unscale_and_stats_(
        grads, out.words, at, scale, below_at, below, max_norm, clip, resolve_impl(_OP, impl, device)
    )
    return out


def _run(grads, words, inv_scale_at, inv_scale, below_at, below, max_norm, clip, impl) -> None:
    grads = [g.detach() for g in grads]
    if impl == "triton":
        from kernels.unscale.launch import launch_unscale  # imports triton

        launch_unscale(grads, words, inv_scale_at, inv_scale, below_at, below, max_norm, clip)
        return increment_versions(grads)
    out = TensorStats(words)
    if words.device.type == "cpu":
        inv_scale = inv_scale if inv_scale_at is None else inv_scale_at.item()
        below = below if below_at is None else below_at.item()
        flats = [flat(g) for g in grads]
        host_stats(flats, out, below, inv_scale, max_norm)
        for g, f in zip(grads, flats, strict=True):
            if f.data_ptr() != g.data_ptr():  # not dense: f is a copy
                g.copy_(f.view(g.shape))
        if clip and grads:
            torch._foreach_mul_(grads, out.clip_factor)
        increment_versions(grads)
    else:
        scale = torch.tensor(inv_scale, device=words.device) if inv_scale_at is None else inv_scale_at
        reference_unscale_(grads, out, scale, below if below_at is None else below_at, max_norm, clip)


@torch.library.register_fake("dtype_dynamics_unscale::unscale_and_stats_", lib=_library)
def _fake(*args) -> None:
    return None


_library.impl("unscale_and_stats_", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_unscale.unscale_and_stats_)
def _no_model_flops(*args, **kwargs) -> int:
    """Unscaling is not the model's work: it adds nothing to model FLOPs."""
    return 0
