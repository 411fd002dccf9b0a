"""Triton kernels that every fused loss shares: sum its rows, count its targets, fold in grad_output."""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES, number_or_tensor

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
    factor_at, number = number_or_tensor(factor)
    rows, has_factor = row_loss.shape[0], factor_at is not None
    sum_rows[(1,)](row_loss, out, factor_at, number, rows, HAS_FACTOR=has_factor, BLOCK=_BLOCK, num_warps=8)


def launch_inverse_count(targets, out, ignore_index) -> None:
    inverse_count[(1,)](targets, out, targets.shape[0], ignore_index, BLOCK=_BLOCK, num_warps=8)


def launch_scale(grad, grad_output) -> None:
    rows, width = grad.shape
    block = min(_SCALE_BLOCK, triton.next_power_of_2(width))
    grid = (min(rows, _SCALE_PROGRAMS),)
    scale_rows[grid](grad, grad_output, rows, grad.stride(0), width, BLOCK=block, num_warps=max(1, min(8, block // 512)))


def compile_specs() -> list[CompileSpec]:
    losses, targets = torch.empty(8192, device="meta"), torch.empty(8192, dtype=torch.int64, device="meta")
    scalar = torch.empty((), device="meta")
    specs = as_launched([("sum_rows", "fp32", "8192")], launch_sum, losses, scalar, scalar, streaming=False)
    specs += as_launched([("inverse_count", "i64", "8192")], launch_inverse_count, targets, scalar, -100, streaming=False)
    for name, dtype in DTYPES.items():
        grad = torch.empty(8192, 50304, dtype=dtype, device="meta")
        specs += as_launched([("scale_rows", name, "8192x50304")], launch_scale, grad, scalar)
    return specs
