"""The cross-entropy kernels as they are really launched, for `python -m kernels compile`."""

from kernels.compile import CompileSpec
from kernels.cross_entropy import triton_kernel


def compile_specs() -> list[CompileSpec]:
    specs = []
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for width in (50304, 8192, 1024):
            shape = f"8192x{width}"
            p = triton_kernel.plan_rows(8192, width, size)
            specs.append(_rows_spec("cross_entropy_rows", dtype, p, shape))
            if width == 50304:
                only_loss = {"GRAD": False, "STATE": True, "SMOOTH": True, "STATS": False, "grad": None, "words": None}
                specs.append(_rows_spec("cross_entropy_loss", dtype, p, shape, **only_loss))
                specs.append(_gradient_spec(dtype, width, shape))
    return specs


def _rows_spec(kernel, dtype, p, shape, **changed) -> CompileSpec:
    """A pointer changed to None is a branch compiled away."""
    return CompileSpec(
        kernel=kernel,
        dtype=dtype,
        fn=lambda: triton_kernel.cross_entropy_rows,
        signature={
            "logits": f"*{dtype}",
            "grad": f"*{dtype}",
            "row_loss": "*fp32",
            "row_state": "*fp32",
            "targets": "*i64",
            "factor_ptr": "*fp32",
            "words": "*i64",
            "stride": "i32",
            "grad_stride": "i32",
            "width": "i32",
            "valid": "i32",
            "ignore_index": "i32",
            "factor": "fp32",
            "smoothing": "fp32",
            "z_loss": "fp32",
        },
        constexprs={
            "GRAD": True,
            "STATE": False,
            "SMOOTH": False,
            "STATS": True,
            "HAS_FACTOR": True,
            "ONE_TILE": p.one_tile,
            "GROUP": p.group,
            "BLOCK": p.block,
            "THREADS": 32 * p.num_warps,
            **changed,
        },
        divisible=(
            "logits",
            "grad",
            "row_loss",
            "row_state",
            "targets",
            "factor_ptr",
            "words",
            "stride",
            "grad_stride",
            "width",
        ),
        num_warps=p.num_warps,
        streaming=True,
        shape=shape,
        maxnreg=p.registers,
    )


def _gradient_spec(dtype, width, shape) -> CompileSpec:
    p = triton_kernel.plan_gradient(8192, width)
    return CompileSpec(
        kernel="cross_entropy_gradient",
        dtype=dtype,
        fn=lambda: triton_kernel.cross_entropy_gradient,
        signature={
            "logits": f"*{dtype}",
            "grad": f"*{dtype}",
            "row_state": "*fp32",
            "targets": "*i64",
            "factor_ptr": "*fp32",
            "stride": "i32",
            "grad_stride": "i32",
            "width": "i32",
            "valid": "i32",
            "ignore_index": "i32",
            "smoothing": "fp32",
            "z_loss": "fp32",
        },
        constexprs={"BLOCK": p.block},
        divisible=("logits", "grad", "row_state", "targets", "factor_ptr", "stride", "grad_stride", "width"),
        num_warps=p.num_warps,
        streaming=True,
        shape=shape,
        maxnreg=p.registers,
    )
