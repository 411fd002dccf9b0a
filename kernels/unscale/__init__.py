"""Unscale, count, measure and clip the gradients of a loss-scaled step; and `scale_`, the clip alone.

With S the loss scale, c = 1/S and g the gradients as backward left them:

    y_i        = round(g_i c)                         what `GradScaler.unscale_` leaves, to the last bit
    found_inf  = 1 if some g_i is NaN or Inf          before the multiplication, as in GradScaler
    statistics of y as in multi_tensor_stats, except
    below      counts 0 < |g_i| < t, t = 2^-24: underflow *at the scale at which backward ran*
    factor     = min(1, max_norm / (norm + 1e-6))     fp32, evaluated as `clip_grad_norm_` does

Memory passes, a pass being one read or one write of all gradients. torch: unscale reads and
writes, the norm reads, the clip reads and writes: 5. Here:

    clip=False: one kernel reads g, writes y:                                    2
                (the caller folds `clip_factor` into the optimizer, or multiplies: 4)
    clip=True:  a kernel reads g and measures y without writing it; a second     3
                reads g and writes round(y * factor), tiles in reverse order,
                so that it starts with what the first left in the L2 cache

The second kernel rounds twice, as torch does (y to the gradient's dtype, then the product), so the
result differs from torch only where the norm itself does (torch sums in fp32, here in float64), and in
bf16 on CUDA, where torch also rounds the factor to bf16.

scale_:

    y_i = round(fl32(x_i c))        c and the product in fp32, rounded to the dtype of x; in fp32 that is x_i c

Why not `torch._foreach_mul_(tensors, c)`: on a CPU it does this, and on CUDA it does for fp32 tensors, in launches of up
to 110 tensors. With 16-bit tensors on CUDA it takes its slow path (c is not of their dtype): a launch for each tensor,
and c is first rounded to their dtype, because a 0-dim operand on the device is cast like any other. That moves every
gradient by up to 2^-9 of itself in bf16 (2^-12 in fp16), and a c of 2^-25 or less is 0 in fp16.

Memory passes, a pass being one read or one write of all tensors: 2, in one launch.
"""

from collections.abc import Sequence

import torch

from kernels.dispatch import check_device_scalar, number_or_tensor, register, resolve_impl
from kernels.multi_tensor_stats import fitting_out, list_device
from kernels.multi_tensor_stats.cpu import cpu_stats
from kernels.multi_tensor_stats.reference import UNDERFLOW_BELOW, TensorStats, reference_stats
from kernels.tensor_list import check_tensors, copy_back, flat, increment_versions

_OP = "unscale_and_stats_"
_library = torch.library.Library("dtype_dynamics_unscale", "DEF")
_SCALE = "scale_"
_scale_library = torch.library.Library("dtype_dynamics_scale", "DEF")


def bytes_moved(numels: list[int], element_bytes: list[int], clip: bool = False) -> int:
    """Device-memory bytes of one call, of scale_ too: 2 passes over the tensors, 3 with `clip`."""
    return (3 if clip else 2) * sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int], clip: bool) -> int:
    """Floating-point operations an element: unscale 1, square and add 2; with `clip` unscale and clip again, 2."""
    return (5 if clip else 3) * sum(numels)


def scale_flops(numels: list[int]) -> int:
    """Floating-point operations of scale_: a multiplication an element."""
    return sum(numels)


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
    device = list_device(grads, out)
    check_tensors(_OP, grads, device)
    if clip and max_norm is None:
        raise ValueError(f"{_OP}: clip=True needs max_norm")
    out = fitting_out(_OP, out, len(grads), device)
    check_device_scalar(_OP, "inv_scale", inv_scale, device)
    check_device_scalar(_OP, "underflow_below", underflow_below, device)
    _unscale_all(
        grads, out.table, *number_or_tensor(inv_scale), *number_or_tensor(underflow_below), max_norm, clip,
        resolve_impl(_OP, impl, device),
    )  # fmt: skip
    return out


def reference_unscale_(
    grads: list[torch.Tensor],
    out: TensorStats,
    inv_scale: torch.Tensor,
    underflow_below: float | torch.Tensor,
    max_norm: float | None,
    clip: bool,
) -> None:
    """The definition, slow, any device: GradScaler's kernel, float64 statistics, clip_grad_norm_'s factor."""
    raw = [g.clone() for g in grads]
    found_inf = torch.zeros((), device=out.table.device)
    if grads:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale.float().reshape(()))
    reference_stats(grads, out, underflow_below, raw, max_norm)
    if clip:
        reference_scale_(grads, out.clip_factor)


def _run(grads, table, inv_scale_at, inv_scale, below_at, below, max_norm, clip, impl) -> None:
    grads = [g.detach() for g in grads]
    if impl == "triton":
        from kernels.unscale.triton_kernel import launch_unscale  # imports triton

        launch_unscale(grads, table, inv_scale_at, inv_scale, below_at, below, max_norm, clip)
        return increment_versions(grads)
    out = TensorStats(table)
    if table.device.type == "cpu":
        inv_scale = inv_scale if inv_scale_at is None else inv_scale_at.item()
        below = below if below_at is None else below_at.item()
        flats = [flat(g) for g in grads]
        cpu_stats(flats, out, below, inv_scale, max_norm)
        copy_back(grads, flats)
        if clip and grads:
            torch._foreach_mul_(grads, out.clip_factor)
        increment_versions(grads)
    else:
        scale = torch.tensor(inv_scale, device=table.device) if inv_scale_at is None else inv_scale_at
        reference_unscale_(grads, out, scale, below if below_at is None else below_at, max_norm, clip)


_unscale_all = register(
    _library,
    "unscale_and_stats_(Tensor(a!)[] grads, Tensor(b!) table, Tensor? inv_scale_at, float inv_scale, "
    "Tensor? below_at, float below, float? max_norm, bool clip, str impl) -> ()",
    _run,
)


def scale_(tensors: Sequence[torch.Tensor], factor: torch.Tensor, *, impl: str = "auto") -> None:
    """Multiply tensors by `factor` in place: the product in fp32, rounded to each dtype. No host sync, one launch.

    tensors   fp32, bf16, fp16, mixed; any shapes, empty and non-contiguous too (one that is not dense is copied
              and copied back); one device. An empty list is left as it is
    factor    a one-element float32 tensor on their device, never rounded to their dtype
    impl      "auto": Triton on CUDA, `torch._foreach_mul_` on a CPU, which gives the same bits;
              "torch" on CUDA is the definition, two launches a tensor

    Raises TypeError for other dtypes, sparse tensors or a factor that is no float32 tensor, ValueError for mixed
    devices or several factors, RuntimeError when a CUDA graph is being captured and this list has not been seen
    before. The autograd version counters are bumped. Deterministic.
    """
    tensors = list(tensors)
    if not isinstance(factor, torch.Tensor) or factor.dtype != torch.float32:
        given = str(factor.dtype)[6:] if isinstance(factor, torch.Tensor) else type(factor).__name__
        raise TypeError(f"{_SCALE}: factor must be a one-element float32 tensor, got {given}")
    device = tensors[0].device if tensors and isinstance(tensors[0], torch.Tensor) else factor.device
    check_tensors(_SCALE, tensors, device)
    check_device_scalar(_SCALE, "factor", factor, device)
    impl = resolve_impl(_SCALE, impl, device)
    if tensors:
        _scale_all(tensors, factor.detach().reshape(()), impl)


def reference_scale_(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """The definition: the product with `factor` (fp32, 0-dim) in fp32, rounded to each tensor's dtype, in place."""
    for x in tensors:
        x.copy_(x.float() * factor)


def _run_scale(tensors, factor, impl) -> None:
    tensors = [x.detach() for x in tensors]
    if impl == "triton":
        from kernels.unscale.triton_kernel import launch_scale  # imports triton

        launch_scale(tensors, factor)
        increment_versions(tensors)
    elif factor.device.type == "cpu":
        torch._foreach_mul_(tensors, factor)
    else:
        reference_scale_(tensors, factor)


_scale_all = register(_scale_library, "scale_(Tensor(a!)[] tensors, Tensor factor, str impl) -> ()", _run_scale)
