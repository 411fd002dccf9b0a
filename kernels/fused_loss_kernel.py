"""Triton kernels that every fused loss shares: sum its rows, count its targets, fold in grad_output."""

import triton
import triton.language as tl

from kernels.compile import CompileSpec

_BLOCK = 1024
_SCALE_BLOCK = 4096
_SCALE_PROGRAMS = 2048


@triton.jit
def sum_rows(row_loss, out, factor_ptr, factor, rows, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor * sum(row_loss), by one program in fp64: the same bits every time."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + i, mask=i < rows, other=0.0).to(tl.float64)
    loss = tl.sum(total, 0)
    if HAS_FACTOR:
        loss *= tl.load(factor_ptr).to(tl.float64)
    tl.store(out, (loss * factor).to(tl.float32))


@triton.jit
def inverse_count(targets, out, rows, ignore_index, BLOCK: tl.constexpr):
    """out = 1 / number of targets that are not ignored (1/0 is Inf, and the mean of nothing NaN, as in torch)."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        target = tl.load(targets + i, mask=i < rows, other=ignore_index)
        count += (target != ignore_index).to(tl.int32)
    tl.store(out, 1.0 / tl.sum(count, 0).to(tl.float32))


@triton.jit
def scale_rows(grad, grad_output, rows, stride, width, BLOCK: tl.constexpr):
    """grad *= grad_output. Every program leaves at once when it is 1, which is the usual case."""
    scale = tl.load(grad_output).to(tl.float32)
    if scale != 1.0:
        row_ptr = grad + tl.program_id(0).to(tl.int64) * stride
        step = tl.num_programs(0).to(tl.int64) * stride
        for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
            for start in range(0, width, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                g = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
                tl.store(row_ptr + cols, (g * scale).to(grad.dtype.element_ty), mask=cols < width)
            row_ptr += step


def launch_sum(row_loss, out, factor) -> None:
    """factor: a Python float, or an fp32 device scalar."""
    pointer, number = (None, factor) if isinstance(factor, float) else (factor, 1.0)
    sum_rows[(1,)](row_loss, out, pointer, number, row_loss.shape[0], HAS_FACTOR=pointer is not None, BLOCK=_BLOCK, num_warps=8)


def launch_inverse_count(targets, out, ignore_index) -> None:
    inverse_count[(1,)](targets, out, targets.shape[0], ignore_index, BLOCK=_BLOCK, num_warps=8)


def launch_scale(grad, grad_output) -> None:
    rows, width = grad.shape
    block = min(_SCALE_BLOCK, triton.next_power_of_2(width))
    grid = (min(rows, _SCALE_PROGRAMS),)
    scale_rows[grid](grad, grad_output, rows, grad.stride(0), width, BLOCK=block, num_warps=max(1, min(8, block // 512)))


def compile_specs() -> list[CompileSpec]:
    specs = [
        CompileSpec(
            "sum_rows",
            "fp32",
            lambda: sum_rows,
            {"row_loss": "*fp32", "out": "*fp32", "factor_ptr": "*fp32", "factor": "fp32", "rows": "i32"},
            {"HAS_FACTOR": True, "BLOCK": _BLOCK},
            divisible=("row_loss", "out", "factor_ptr", "rows"),
            num_warps=8,
            shape="8192",
        ),
        CompileSpec(
            "inverse_count",
            "i64",
            lambda: inverse_count,
            {"targets": "*i64", "out": "*fp32", "rows": "i32", "ignore_index": "i32"},
            {"BLOCK": _BLOCK},
            divisible=("targets", "out", "rows"),
            num_warps=8,
            shape="8192",
        ),
    ]
    for dtype in ("fp32", "bf16", "fp16"):
        specs.append(
            CompileSpec(
                "scale_rows",
                dtype,
                lambda: scale_rows,
                {"grad": f"*{dtype}", "grad_output": "*fp32", "rows": "i32", "stride": "i32", "width": "i32"},
                {"BLOCK": _SCALE_BLOCK},
                divisible=("grad", "grad_output", "rows", "stride", "width"),
                num_warps=8,
                streaming=True,
                shape="8192x50304",
            )
        )
    return specs
