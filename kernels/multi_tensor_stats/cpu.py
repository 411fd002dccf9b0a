"""What runs on a CPU: cache-sized chunks, and numpy where its loops beat torch's.

Measured on 128K fp32 values, one core of an EPYC, ns an element: |x| 0.06, a maximum of the bits 0.02 (of the floats
0.04, aminmax 0.14), a comparison 0.03 (torch 0.33) and counting its mask 0.02, dot products 0.04. So every chunk
(CHUNK elements, half a megabyte of fp32) stays in the L2 cache and is passed over there as often as its
values ask for: nothing below a threshold is nothing below a smaller one. Small tensors are packed into one chunk,
because a call costs more than their bytes. One thread does it all.

The largest |x| of a chunk proves that it holds no NaN and no Inf; only a chunk that fails the proof is counted
the careful way. Sums of squares run in fp32 within a chunk, float64 across chunks, and are redone in float64
where fp32 would overflow or lose small squares. Deterministic: the same list gives the same bits. Needs numpy 2.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels.float_bits import INFINITY, bit_limit, bits_of, extremes, value_of
from kernels.float_formats import FP32
from kernels.multi_tensor_stats import reference as r

CHUNK = 1 << 17  # elements; 512 KB of fp32
BLOCK = 1 << 10  # elements per fp32 dot product: bounds its rounding error
SMALL = 1 << 12  # tensors below this are packed
SERIAL = 1 << 15  # elements that torch converts in the calling thread: waking others costs 10 ms on a busy machine

_local = threading.local()


@dataclass(frozen=True)
class Limits:
    """|x| < limit exactly where the bits of |x| are below the pattern; in fp32 where |x| is below the float."""

    flush_end: int  # zero or flushed
    normal_from: int  # zero, flushed or subnormal in fp16
    below: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, dtype: torch.dtype, below: float) -> "Limits":
        after_flush = float(np.nextafter(np.float32(r.FP16_FLUSH_AT), np.float32(1)))
        return cls(*(max(0, bit_limit(value, dtype)) for value in (after_flush, r.FP16_NORMAL_FROM, below)))


class _Scratch:
    """Buffers of one thread, allocated once: fresh blocks of this size would page-fault at every call."""

    def __init__(self):
        self.sizes = {4: np.empty(CHUNK, np.int32), 2: np.empty(CHUNK, np.int16)}
        self.mask = np.empty(CHUNK, np.bool_)
        self.upcast = torch.empty(CHUNK)
        self.upcast_np = self.upcast.numpy()


def cpu_stats(
    tensors: list[torch.Tensor],
    out: r.TensorStats,
    underflow_below: float,
    inv_scale: float | None = None,
    max_norm: float | None = None,
    counts: str = "all",
) -> None:
    """Fill `out` from flat CPU tensors; with `inv_scale` they are multiplied by it in place on the way."""
    table = out.table.numpy()
    found_inf = _fill(table, tensors, underflow_below, inv_scale, counts)
    scaler = table.view(np.float32)
    scaler[-1, r.FOUND_INF_F32] = found_inf
    scaler[-1, r.CLIP_FACTOR_F32] = 1.0 if max_norm is None else r.clip_factor(out.total_norm.float(), max_norm).item()


def cpu_table(tensors: list[torch.Tensor], underflow_below: float) -> np.ndarray:
    """The rows of a TensorStats as an array of their own, int64 (n + 1, 12), every count made."""
    table = np.empty((len(tensors) + 1, r.COLUMNS), np.int64)
    _fill(table, tensors, underflow_below, None, "all")
    return table


def _fill(table: np.ndarray, tensors: list[torch.Tensor], underflow_below: float, inv_scale: float | None, counts: str) -> bool:
    """Overwrite `table`; return whether a value was not finite (before unscaling)."""
    if not hasattr(_local, "scratch"):
        _local.scratch = _Scratch()
    table[:] = 0
    work = _Pass(_local.scratch, table, underflow_below, inv_scale, counts)
    with np.errstate(all="ignore"):
        small: dict[torch.dtype, list[int]] = {}
        for row, x in enumerate(tensors):
            if x.numel() < SMALL:
                small.setdefault(x.dtype, []).append(row)
            else:
                bits = bits_of(x).reshape(-1)
                for start in range(0, bits.size, CHUNK):
                    work.chunk(bits[start : start + CHUNK], x.dtype, row, None)
        for dtype, rows in small.items():
            _packed(work, dtype, rows, tensors)
        table[:-1, r.NUMEL] = [x.numel() for x in tensors]
        _totals(table)
    left_out = {"all": [], "underflow": [r.FP16_FLUSH, r.FP16_SUBNORMAL], "none": slice(r.ZEROS, r.BELOW + 1)}
    table[:, left_out[counts]] = r.NOT_COUNTED
    return work.found_inf


def _packed(work: "_Pass", dtype: torch.dtype, rows: list[int], tensors: list[torch.Tensor]) -> None:
    """Small tensors of one dtype, copied side by side into chunks of at most CHUNK elements."""
    rows = [row for row in rows if tensors[row].numel()]
    while rows:
        ends = np.cumsum([tensors[row].numel() for row in rows])
        count = int(np.searchsorted(ends, CHUNK, side="right"))
        batch, rows = rows[:count], rows[count:]
        parts = [tensors[row].detach() for row in batch]
        buffer = parts[0] if count == 1 else torch._C._nn.flatten_dense_tensors(parts)
        starts = None if count == 1 else np.concatenate(([0], ends[: count - 1]))
        work.chunk(bits_of(buffer).reshape(-1), dtype, batch[0] if count == 1 else np.array(batch), starts)
        if work.inv_scale is not None and count > 1:
            torch._foreach_mul_(parts, work.inv_scale)


class _Pass:
    """One pass over the list: adds chunks to the rows of `table`."""

    def __init__(self, scratch: _Scratch, table: np.ndarray, below: float, inv_scale: float | None, counts: str):
        self.scratch, self.table, self.below, self.counts = scratch, table, below, counts
        # A tensor: `_foreach_mul_` by a Python number first rounds the number to bf16.
        self.inv_scale = None if inv_scale is None else torch.tensor(inv_scale, dtype=torch.float32)
        self.found_inf = False

    def chunk(self, bits: np.ndarray, dtype: torch.dtype, rows: int | np.ndarray, starts: np.ndarray | None) -> None:
        """`bits` (contiguous, at most CHUNK) belong to the row `rows`, or, segment by segment, to several."""
        row = self.table[rows]  # a view for one row, a copy for several: hence the assignment below
        limits = Limits.of(dtype, self.below)
        sizes = None if self.counts == "none" and self.inv_scale is None and starts is None else self._sizes(bits)
        top = max(extremes(bits)) if sizes is None else int(sizes.max())
        self.found_inf |= top >= INFINITY[dtype]
        if self.counts == "underflow" or self.inv_scale is not None:
            zeros = self._count_below(row, sizes, limits, top, starts)
            if self.counts == "underflow":
                row[..., r.ZEROS] += zeros
        if self.inv_scale is not None:
            values = torch.from_numpy(bits).view(dtype)
            if dtype == torch.float32:
                np.multiply(values.numpy(), self.inv_scale.numpy(), out=values.numpy())
            else:
                values.mul_(self.inv_scale)
            sizes = self._sizes(bits)
            top = int(sizes.max())
        if self.counts == "all":
            self._count_all(row, sizes, limits, top, starts)
        self._sums(bits if sizes is None else sizes, dtype, row, starts, top)
        self.table[rows] = row

    def _sizes(self, bits: np.ndarray) -> np.ndarray:
        """The bits of |x|, in scratch memory."""
        no_sign = np.int32(0x7FFFFFFF) if bits.itemsize == 4 else np.int16(0x7FFF)
        return np.bitwise_and(bits, no_sign, out=self.scratch.sizes[bits.itemsize][: bits.size])

    def _count_below(self, row: np.ndarray, sizes: np.ndarray, limits: Limits, top: int, starts) -> np.ndarray | int:
        """Add `below`; returns the zeros, which it leaves out."""
        under = self._smaller(sizes, limits.below, top, starts) if limits.below else 0
        zeros = self._smaller(sizes, 1, top, starts) if not limits.below or _some(under) else 0
        if limits.below:
            row[..., r.BELOW] += under - zeros
        return zeros

    def _count_all(self, row: np.ndarray, sizes: np.ndarray, limits: Limits, top: int, starts) -> None:
        """Add the counts of the unscaled values; each smaller threshold only where the larger one caught something."""
        tiny = self._smaller(sizes, limits.normal_from, top, starts)
        flushed = self._smaller(sizes, limits.flush_end, top, starts) if _some(tiny) else 0
        zeros = self._smaller(sizes, 1, top, starts) if _some(flushed) else 0
        row[..., r.ZEROS] += zeros
        row[..., r.FP16_FLUSH] += flushed - zeros
        row[..., r.FP16_SUBNORMAL] += tiny - flushed
        if self.inv_scale is None and limits.below:
            known = limits.below <= limits.normal_from and not _some(tiny)
            row[..., r.BELOW] += 0 if known else self._smaller(sizes, limits.below, top, starts) - zeros

    def _smaller(self, sizes: np.ndarray, pattern: int, top: int, starts) -> np.ndarray | int:
        """How many of `sizes` are below the pattern, in all or in each segment (0: in none)."""
        if top < pattern:
            return sizes.size if starts is None else np.diff(np.append(starts, sizes.size))
        mask = self.scratch.mask[: sizes.size]
        if sizes.itemsize == 4 and pattern > 1:  # floats compare twice as fast; 1 would be subnormal, and may be flushed
            np.less(sizes.view(np.float32), np.int32(pattern).view(np.float32), out=mask)
        else:
            np.less(sizes, sizes.dtype.type(pattern), out=mask)
        return _per_segment(mask, starts)

    def _sums(self, bits: np.ndarray, dtype: torch.dtype, row: np.ndarray, starts, top: int) -> None:
        """Sum of squares and largest finite |x|; NaN and Inf counted only where the chunk holds some."""
        floats, infinity = row.view(np.float64), INFINITY[dtype]
        values = self._fp32(bits, dtype)
        if top < infinity and starts is None:
            largest = value_of(top, dtype)
        elif top < infinity:
            largest = np.maximum.reduceat(values, starts)
        else:
            sizes = np.abs(values)
            row[..., r.NAN] += _per_segment(np.isnan(sizes), starts)
            row[..., r.INF] += _per_segment(np.isinf(sizes), starts)
            finite = np.where(sizes < np.inf, sizes, np.float32(0))
            largest = finite.max() if starts is None else np.maximum.reduceat(finite, starts)
        if starts is None:
            floats[r.ABSMAX] = max(floats[r.ABSMAX], largest)
        else:
            floats[..., r.ABSMAX] = np.maximum(floats[..., r.ABSMAX], largest)
        if top:
            floats[..., r.SUMSQ] += _sum_of_squares(values, starts)

    def _fp32(self, bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """The same numbers in fp32, exactly."""
        if dtype == torch.float32:
            return bits.view(np.float32)
        out = self.scratch.upcast_np[: bits.size]
        if dtype == torch.bfloat16:
            return np.left_shift(bits, 16, out=out.view(np.int32), dtype=np.int32).view(np.float32)
        x = torch.from_numpy(bits).view(dtype)
        for start in range(0, x.numel(), SERIAL):
            self.scratch.upcast[start : start + SERIAL][: x.numel() - start].copy_(x[start : start + SERIAL])
        return out


def _some(count: np.ndarray | int) -> bool:
    return bool(count) if isinstance(count, int) else bool(count.any())


def _per_segment(mask: np.ndarray, starts: np.ndarray | None) -> np.ndarray | int:
    """How many are True, in all or in each segment (0: in none)."""
    count = np.count_nonzero(mask)
    return count if starts is None or not count else np.add.reduceat(mask, starts, dtype=np.int64)


def _sum_of_squares(values: np.ndarray, starts: np.ndarray | None) -> np.ndarray | float:
    """float64; fp32 dot products are kept only where none overflowed and none can have lost small squares."""
    if starts is not None:
        return np.add.reduceat(np.square(values, dtype=np.float64), starts)
    whole = values.size // BLOCK * BLOCK
    blocks = values[:whole].reshape(-1, BLOCK)
    dots, rest = np.vecdot(blocks, blocks), values[whole:]
    total = float(dots.sum(dtype=np.float64)) + float(np.dot(rest, rest))
    # Squares below 2^-126 lose up to 2^-150 each; above the bound that is less than one rounding of the sum.
    if values.size * FP32.smallest_normal <= total < float("inf"):
        return total
    return np.square(values, dtype=np.float64).sum()


def _totals(table: np.ndarray) -> None:
    """Norms and the last row, from the rows before it."""
    floats = table.view(np.float64)
    table[-1] = table[:-1].sum(0)
    floats[-1, r.SUMSQ] = floats[:-1, r.SUMSQ].sum()
    floats[:, r.NORM] = np.sqrt(floats[:, r.SUMSQ])
    floats[-1, r.ABSMAX] = floats[:-1, r.ABSMAX].max(initial=0.0)
    bad = np.flatnonzero(table[:-1, r.NAN] + table[:-1, r.INF])
    table[-1, r.FIRST_NONFINITE] = bad[0] if bad.size else -1
