"""Multiply a list of tensors by one fp32 number on the device, in place: the last step of clipping.

    y_i = round(fl32(x_i c))        c and the product in fp32, rounded to the dtype of x; in fp32 that is x_i c

Why not `torch._foreach_mul_(tensors, c)`: on a CPU it does this, and on CUDA it does for fp32 tensors, in launches of up
to 110 tensors. With 16-bit tensors on CUDA it takes its slow path (c is not of their dtype): a launch for each tensor,
and c is first rounded to their dtype, because a 0-dim operand on the device is cast like any other. That moves every
gradient by up to 2^-9 of itself in bf16 (2^-12 in fp16), and a c of 2^-25 or less is 0 in fp16.

Memory passes, a pass being one read or one write of all tensors: 2, in one launch.

GPU times: unmeasured.
"""

from importlib import import_module

_LAZY = {
    "scale_": "op",
    "compile_specs": "triton_kernel",
    "bench_arms": "bench_arms",
}


def bytes_moved(numels: list[int], element_bytes: list[int]) -> int:
    """Device-memory bytes of one call: every element read and written once."""
    return 2 * sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int]) -> int:
    """Floating-point operations: a multiplication an element."""
    return sum(numels)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
