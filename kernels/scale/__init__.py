"""Multiply a list of tensors by one fp32 number on the device, in place: the last step of clipping.

    y_i = round(fl32(x_i c))        c and the product in fp32, rounded to the dtype of x; in fp32 that is x_i c

Why not `torch._foreach_mul_(tensors, c)`: on a CPU it does this, and on CUDA it does for fp32 tensors, in launches of up
to 110 tensors. With 16-bit tensors on CUDA it takes its slow path (c is not of their dtype): a launch for each tensor,
and c is first rounded to their dtype, because a 0-dim operand on the device is cast like any other. That moves every
gradient by up to 2^-9 of itself in bf16 (2^-12 in fp16), and a c of 2^-25 or less is 0 in fp16.

Memory passes, a pass being one read or one write of all tensors: 2, in one launch.

GPU times: unmeasured.
"""

from collections.abc import Sequence

import torch

from kernels.dispatch import check_device_scalar, register, resolve_impl
from kernels.tensor_list import check_tensors, increment_versions

_OP = "scale_"
_library = torch.library.Library("dtype_dynamics_scale", "DEF")


def bytes_moved(numels: list[int], element_bytes: list[int]) -> int:
    """Device-memory bytes of one call: every element read and written once."""
    return 2 * sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int]) -> int:
    """Floating-point operations: a multiplication an element."""
    return sum(numels)


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
        _scale_all(tensors, factor.detach().reshape(()), impl)


def reference_scale_(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """The definition: the product with `factor` (fp32, 0-dim) in fp32, rounded to each tensor's dtype, in place."""
    for x in tensors:
        x.copy_(x.float() * factor)


def _run(tensors, factor, impl) -> None:
    tensors = [x.detach() for x in tensors]
    if impl == "triton":
        from kernels.scale.triton_kernel import launch_scale  # imports triton

        launch_scale(tensors, factor)
        increment_versions(tensors)
    elif factor.device.type == "cpu":
        torch._foreach_mul_(tensors, factor)
    else:
        reference_scale_(tensors, factor)


_scale_all = register(_library, "scale_(Tensor(a!)[] tensors, Tensor factor, str impl) -> ()", _run)
