"""Triton kernels for logit statistics: `record_row` inside a loss kernel, `logit_stats_rows` alone."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES
from kernels.logit_stats.reference import COUNTERS, FP16_MAX_BITS

_FP16_MAX_BITS = tl.constexpr(FP16_MAX_BITS[torch.float32])  # 65,504 as fp32 bits
_INF_BITS = tl.constexpr(0x7F800000)
_LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def abs_bits(x):
    """fp32 -> the integer that orders like |x|, with Inf and NaN above every finite value."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def load_bits(row_ptr, start, width, valid, BLOCK: tl.constexpr):
    """abs_bits of one tile; -1 outside the valid columns. The mask keeps the alignment of `width`."""
    cols = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return x, tl.where(cols < valid, abs_bits(x), -1), cols


@triton.jit
def count_row(row_ptr, width, valid, counters, STEP: tl.constexpr):
    """The slow path of a row with something beyond 65,504: exact counts; returns its largest finite bits, or -1."""
    nan = tl.zeros([STEP], tl.int32)
    pos = tl.zeros([STEP], tl.int32)
    neg = tl.zeros([STEP], tl.int32)
    over = tl.zeros([STEP], tl.int32)
    top = tl.full([STEP], -1, tl.int32)
    for start in range(0, width, STEP):
        x, bits, cols = load_bits(row_ptr, start, width, valid, STEP)
        nan += (bits > _INF_BITS).to(tl.int32)
        pos += ((bits == _INF_BITS) & (x > 0)).to(tl.int32)
        neg += ((bits == _INF_BITS) & (x < 0)).to(tl.int32)
        over += ((bits > _FP16_MAX_BITS) & (bits < _INF_BITS)).to(tl.int32)
        top = tl.maximum(top, tl.where(bits < _INF_BITS, bits, -1))
    tl.atomic_add(counters + 1, tl.sum(nan, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 2, tl.sum(pos, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 3, tl.sum(neg, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 4, tl.sum(over, 0).to(tl.int64), sem="relaxed")
    return tl.max(top, 0)


@triton.jit
def load_key(counters, THREADS: tl.constexpr):
    """The accumulator's key once per thread of the block; `tl.max` of it is a value the whole block agrees on.

    Not a scalar load: each warp would make its own, another program may raise the key in between,
    and warps that disagree would part at a branch with a barrier inside.
    """
    return tl.load(counters + tl.zeros([THREADS], tl.int32), volatile=True)


@triton.jit
def leads(top, row, width, seen):
    """Whether |x| bits `top` in this row may beat the accumulator, whose key was `seen` when the row began.

    Another program may have raised it since. It only grows, so a stale value costs a search
    and never a wrong answer, and loading it early keeps its latency off the row's path.
    """
    first = row.to(tl.int64) * width
    seen_top = (seen >> 32).to(tl.int32)
    seen_index = _LOW_WORD - (seen & _LOW_WORD)
    return (top >= 0) & ((seen == 0) | (top > seen_top) | ((top == seen_top) & (first < seen_index)))


@triton.jit
def raise_key(top, row, col, width, counters):
    index = row.to(tl.int64) * width + col
    tl.atomic_max(counters, (top.to(tl.int64) << 32) | (_LOW_WORD - index), sem="relaxed")


@triton.jit
def record_row(row_ptr, row, width, valid, top, seen, counters, THREADS: tl.constexpr):
    """Fold in a row that can be read again, given `top`, the maximum of its abs_bits over the valid columns.

    Usually this is one comparison; see the package docstring. The rare paths take two columns a
    thread and step, so that they cost the common path no registers.
    """
    STEP: tl.constexpr = 2 * THREADS
    if top > _FP16_MAX_BITS:
        top = count_row(row_ptr, width, valid, counters, STEP)
    if leads(top, row, width, seen):
        col = tl.full([STEP], 0x7FFFFFFF, tl.int32)
        for start in range(0, width, STEP):
            x, bits, cols = load_bits(row_ptr, start, width, valid, STEP)
            col = tl.minimum(col, tl.where(bits == top, cols, 0x7FFFFFFF))
        raise_key(top, row, tl.min(col, 0), width, counters)


@triton.jit
def record_tile(x, bits, cols, row, width, seen, counters):
    """Fold in a tile from registers (bits -1 outside the row): for rows that are overwritten as they are read."""
    top = tl.max(bits, 0)
    if top > _FP16_MAX_BITS:
        infinite = bits == _INF_BITS
        tl.atomic_add(counters + 1, tl.sum((bits > _INF_BITS).to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(counters + 2, tl.sum((infinite & (x > 0)).to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(counters + 3, tl.sum((infinite & (x < 0)).to(tl.int64), 0), sem="relaxed")
        over = (bits > _FP16_MAX_BITS) & (bits < _INF_BITS)
        tl.atomic_add(counters + 4, tl.sum(over.to(tl.int64), 0), sem="relaxed")
        top = tl.max(tl.where(bits < _INF_BITS, bits, -1), 0)
    if leads(top, row, width, seen):
        raise_key(top, row, tl.min(tl.where(bits == top, cols, 0x7FFFFFFF), 0), width, counters)


@triton.jit
def logit_stats_rows(x_ptr, counters, stride, width, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """One program a row: the maximum of abs_bits, then `record_row`."""
    row = tl.program_id(0)
    row_ptr = x_ptr + row.to(tl.int64) * stride
    seen = load_key(counters, THREADS)
    top = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, width, BLOCK):
        x, bits, cols = load_bits(row_ptr, start, width, width, BLOCK)
        top = tl.maximum(top, bits)
    record_row(row_ptr, row, width, width, tl.max(top, 0), tl.max(seen, 0), counters, THREADS)


@dataclass(frozen=True)
class Tiling:
    """How rows of logits are cut: columns a tile, warps and registers a program; `one_tile`: a row is one tile."""

    block: int
    num_warps: int
    registers: int
    one_tile: bool = False

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK": self.block, "THREADS": 32 * self.num_warps, "num_warps": self.num_warps, "maxnreg": self.registers}


def tiling_of(width: int) -> Tiling:
    block = min(4096, max(16, triton.next_power_of_2(width)))
    return Tiling(block, max(1, min(8, block // 512)), registers=64)


def launch(x: torch.Tensor, counters: torch.Tensor) -> None:
    """Fold x (rows, width), unit column stride, into `counters`."""
    rows, width = x.shape
    logit_stats_rows[(rows,)](x, counters, x.stride(0), width, **tiling_of(width).constants)


def on_meta(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix without memory, for `compile_specs`."""
    return torch.empty(rows, width, dtype=dtype, device="meta")


def counters_on_meta() -> torch.Tensor:
    return torch.empty(COUNTERS, dtype=torch.int64, device="meta")


def compile_specs() -> list[CompileSpec]:
    return [
        as_launched([("logit_stats_rows", name, "8192x50304")], launch, on_meta(8192, 50304, dtype), counters_on_meta())[0]
        for name, dtype in DTYPES.items()
    ]
