"""The public op: checks, the choice of implementation, and the torch operator behind it."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import check_device_scalar, resolve_impl
from kernels.multi_tensor_stats.op import check_tensors
from kernels.scale.reference import reference_scale_

_OP = "scale_"
_library = torch.library.Library("dtype_dynamics_scale", "DEF")
_library.define("scale_(Tensor(a!)[] tensors, Tensor factor, str impl) -> ()")


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
        raise TypeError(f"{_OP}: factor must be a one-element float32 tensor, got {given}")
    device = tensors[0].device if tensors and isinstance(tensors[0], torch.Tensor) else factor.device
    check_tensors(_OP, tensors, device)
    check_device_scalar(_OP, "factor", factor, device)
    impl = resolve_impl(_OP, impl, device)
    if tensors:
        torch.ops.dtype_dynamics_scale.scale_(tensors, factor.detach().reshape(()), impl)


def _run(tensors, factor, impl) -> None:
    tensors = [x.detach() for x in tensors]
    if impl == "triton":
        from kernels.scale.launch import launch_scale  # imports triton

        launch_scale(tensors, factor)
        increment_versions(tensors)
    elif factor.device.type == "cpu":
        torch._foreach_mul_(tensors, factor)
    else:
        reference_scale_(tensors, factor)


def increment_versions(tensors: list[torch.Tensor]) -> None:
    """For what was written through raw pointers, on a CPU through numpy: autograd did not see it."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


@torch.library.register_fake("dtype_dynamics_scale::scale_", lib=_library)
def _fake(*args) -> None:
    return None


_library.impl("scale_", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_scale.scale_)
def _no_model_flops(*args, **kwargs) -> int:
    """Clipping is not the model's work: it adds nothing to model FLOPs."""
    return 0
