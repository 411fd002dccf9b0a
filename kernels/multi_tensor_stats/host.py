"""The CPU path: cache-sized pieces, and numpy where its loops beat torch's.

Measured on 64K fp32 values, one core of an EPYC (2 torch threads where torch uses them): compare 2 us
in numpy against 13 in torch, counting a mask 2 against 7, `|x|.max()` 3 against 7 (aminmax). So every piece
(PIECE elements, half a megabyte of fp32) stays in the L2 cache and is passed over eight times there, and small
tensors are packed into one piece, because a call costs more than their bytes. One thread does it all.

The largest |x| of a piece (numpy's max propagates NaN) proves that it holds no NaN and no Inf; only a
piece that fails the proof is counted the careful way. Sums of squares run in fp32 within a piece, float64
across pieces, and are redone in float64 where fp32 would overflow or lose small squares.
Deterministic: the same list gives the same bits. Needs numpy 2 (`vecdot`).
"""

import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels.multi_tensor_stats import stats as s
from kernels.multi_tensor_stats.reference import clip_factor

PIECE = 1 << 17  # elements; 512 KB of fp32
BLOCK = 1 << 10  # elements per fp32 dot product: bounds its rounding error
SMALL = 1 << 13  # tensors below this are packed
SERIAL = 1 << 14  # elements that torch converts in the calling thread: waking others costs 10 ms on a busy machine

_local = threading.local()


class _Scratch:
    """Buffers of one thread, allocated once: fresh blocks of this size would page-fault at every call."""

    def __init__(self):
        self.magnitude = {torch.float32: np.empty(PIECE, np.float32)}
        self.magnitude[torch.bfloat16] = self.magnitude[torch.float16] = np.empty(PIECE, np.int16)
        self.mask = np.empty(PIECE, np.bool_)
        self.upcast = torch.empty(PIECE)
        self.upcast_np = self.upcast.numpy()
        self.packed = {d: torch.empty(PIECE, dtype=d) for d in self.magnitude}


@dataclass(frozen=True)
class _Limits:
    """Thresholds in the units in which a dtype is compared: floats for fp32, bit patterns for 16 bits."""

    flush_end: float  # |x| < flush_end: zero or flushed
    normal_from: float  # |x| < normal_from: zero, flushed or subnormal in fp16
    below: float
    nonfinite_from: float

    @classmethod
    def of(cls, dtype: torch.dtype, below: float) -> "_Limits":
        after_flush = float(np.nextafter(np.float32(s.FP16_FLUSH_AT), np.float32(1)))
        values = (after_flush, s.FP16_NORMAL_FROM, below, float("inf"))
        if dtype == torch.float32:
            return cls(*(_round_up(v, torch.float32) for v in values))
        return cls(*(bit_limit(v, dtype) for v in values))


def _round_up(value: float, dtype: torch.dtype) -> float:
    """Smallest number of `dtype` that is not below `value`: x < value holds for the same x in `dtype`."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    if near.double().item() < value:
        near = torch.nextafter(near, torch.tensor(float("inf"), dtype=dtype))
    return near.item()


@lru_cache(maxsize=64)
def round_up_fp32(value: float) -> float:
    """The threshold t' in fp32 with x < t' exactly where x < value, for x of 32 bits or fewer."""
    return _round_up(value, torch.float32)


def bit_limit(value: float, dtype: torch.dtype) -> int:
    """The bit pattern T of a 16-bit dtype with |x| < value exactly where the bits of |x| are below T."""
    return torch.tensor(_round_up(value, dtype), dtype=dtype).view(torch.int16).item()


def _value(pattern: int, dtype: torch.dtype) -> float:
    return torch.tensor(int(pattern), dtype=torch.int16).view(dtype).item()


def host_stats(
    tensors: list[torch.Tensor],
    out: s.TensorStats,
    underflow_below: float,
    inv_scale: float | None = None,
    max_norm: float | None = None,
    counts: str = "all",
) -> None:
    """Fill `out` from flat CPU tensors; with `inv_scale` they are multiplied by it in place on the way."""
    if not hasattr(_local, "scratch"):
        _local.scratch = _Scratch()
    table = np.zeros((len(tensors) + 1, s.WORDS), np.int64)
    work = _Pass(_local.scratch, table, underflow_below, inv_scale, counts)
    with np.errstate(all="ignore"):
        small: dict[torch.dtype, list[int]] = {}
        for row, x in enumerate(tensors):
            if x.numel() < SMALL:
                small.setdefault(x.dtype, []).append(row)
            else:
                for piece in x.split(PIECE):
                    work.piece(piece, row, None)
        for dtype, rows in small.items():
            _packed(work, dtype, rows, tensors)
        table[:-1, s.NUMEL] = [x.numel() for x in tensors]
        _totals(table)
    left_out = {"all": [], "underflow": [s.FP16_FLUSH, s.FP16_SUBNORMAL], "none": slice(s.ZEROS, s.BELOW + 1)}
    table[:, left_out[counts]] = s.NOT_COUNTED
    out.words.copy_(torch.from_numpy(table))
    out.found_inf.fill_(float(work.found_inf))
    out.clip_factor.copy_(clip_factor(out.total_norm.float(), max_norm))


def _packed(work: "_Pass", dtype: torch.dtype, rows: list[int], tensors: list[torch.Tensor]) -> None:
    """Small tensors of one dtype, copied side by side into pieces of at most PIECE elements."""
    rows = [r for r in rows if tensors[r].numel()]
    while rows:
        ends = np.cumsum([tensors[r].numel() for r in rows])
        count = int(np.searchsorted(ends, PIECE, side="right"))
        batch, rows = rows[:count], rows[count:]
        parts = [tensors[r] for r in batch]
        buffer = work.scratch.packed[dtype][: ends[count - 1]]
        torch.cat(parts, out=buffer)
        work.piece(buffer, np.array(batch), np.concatenate(([0], ends[: count - 1])))
        if work.inv_scale is not None:
            torch._foreach_mul_(parts, work.inv_scale)


class _Pass:
    """One pass over the list: adds pieces to the rows of `table`."""

    def __init__(self, scratch: _Scratch, table: np.ndarray, below: float, inv_scale: float | None, counts: str):
        self.scratch, self.table, self.counts = scratch, table, counts
        # A tensor: `_foreach_mul_` by a Python number first rounds the number to bf16.
        self.inv_scale = None if inv_scale is None else torch.tensor(inv_scale, dtype=torch.float32)
        self.below, self.limits = below, {}
        self.found_inf = False

    def piece(self, x: torch.Tensor, rows: int | np.ndarray, starts: np.ndarray | None) -> None:
        """`x` (contiguous, at most PIECE elements) belongs to the row `rows`, or, segment by segment, to several."""
        limits = self.limits.get(x.dtype)
        if limits is None:
            limits = self.limits[x.dtype] = _Limits.of(x.dtype, self.below)
        row = self.table[rows]  # a view for one row, a copy for several: hence the assignment below
        magnitude = self._magnitude(x)
        top = magnitude.max()
        clean = top < limits.nonfinite_from  # False for NaN
        self.found_inf |= not clean
        if self.counts != "none":
            zeros = self._count_underflow(magnitude, row, limits, starts)
        if self.inv_scale is not None:
            if x.dtype == torch.float32:
                np.multiply(x.numpy(), self.inv_scale.numpy(), out=x.numpy())
            else:
                x.mul_(self.inv_scale)
            magnitude = self._magnitude(x)
            top = magnitude.max()
            clean = top < limits.nonfinite_from
            zeros = self._zeros(magnitude, starts) if self.counts == "all" else 0
        if self.counts == "all":
            row[..., s.ZEROS] += zeros
            flushed = self._below(magnitude, limits.flush_end, starts)
            row[..., s.FP16_FLUSH] += flushed - zeros
            row[..., s.FP16_SUBNORMAL] += self._below(magnitude, limits.normal_from, starts) - flushed
        self._sums(x, magnitude, row, starts, clean, top)
        self.table[rows] = row

    def _count_underflow(self, magnitude: np.ndarray, row: np.ndarray, limits: _Limits, starts) -> np.ndarray | int:
        """Add `below` (and `zeros`, where nothing else will); returns the zeros."""
        zeros = self._zeros(magnitude, starts)
        if limits.below > 0:
            row[..., s.BELOW] += self._below(magnitude, limits.below, starts) - zeros
        if self.counts == "underflow":
            row[..., s.ZEROS] += zeros
        return zeros

    def _magnitude(self, x: torch.Tensor) -> np.ndarray:
        out = self.scratch.magnitude[x.dtype][: x.numel()]
        if x.dtype == torch.float32:
            return np.abs(x.numpy(), out=out)
        return np.bitwise_and(x.view(torch.int16).numpy(), 0x7FFF, out=out)

    def _fp32(self, x: torch.Tensor, magnitude: np.ndarray) -> np.ndarray:
        """x or |x| in fp32, exactly."""
        if x.dtype == torch.float32:
            return magnitude
        out = self.scratch.upcast_np[: x.numel()]
        if x.dtype == torch.bfloat16:
            bits = out.view(np.int32)
            np.copyto(bits, magnitude)
            return np.left_shift(bits, 16, out=bits).view(np.float32)
        for start in range(0, x.numel(), SERIAL):
            self.scratch.upcast[start : start + SERIAL][: x.numel() - start].copy_(x[start : start + SERIAL])
        return out

    def _below(self, magnitude: np.ndarray, limit: float, starts: np.ndarray | None) -> np.ndarray | int:
        mask = np.less(magnitude, magnitude.dtype.type(limit), out=self.scratch.mask[: magnitude.size])
        return _per_segment(mask, starts)

    def _zeros(self, magnitude: np.ndarray, starts: np.ndarray | None) -> np.ndarray | int:
        if starts is None:  # the sign is gone, so zero has no bit set, and numpy counts integers in one pass
            return magnitude.size - np.count_nonzero(magnitude.view(np.int32 if magnitude.itemsize == 4 else np.int16))
        mask = np.equal(magnitude, magnitude.dtype.type(0), out=self.scratch.mask[: magnitude.size])
        return _per_segment(mask, starts)

    def _sums(self, x: torch.Tensor, magnitude: np.ndarray, row: np.ndarray, starts, clean: bool, top) -> None:
        """Sum of squares and largest finite |x|; NaN and Inf counted only where the piece holds some."""
        values = self._fp32(x, magnitude)
        if clean and starts is None:
            top = top if x.dtype == torch.float32 else _value(top, x.dtype)
        elif clean:
            top = np.maximum.reduceat(values if values is magnitude else np.abs(values), starts)
        else:
            nan, inf = np.isnan(values), np.isinf(values)
            row[..., s.NAN] += _per_segment(nan, starts)
            row[..., s.INF] += _per_segment(inf, starts)
            finite = np.where(nan | inf, np.float32(0), np.abs(values))
            top = finite.max() if starts is None else np.maximum.reduceat(finite, starts)
        floats = row.view(np.float64)
        floats[..., s.ABSMAX] = np.maximum(floats[..., s.ABSMAX], top)
        floats[..., s.SUMSQ] += _sum_of_squares(values, starts)


def _per_segment(mask: np.ndarray, starts: np.ndarray | None) -> np.ndarray | int:
    """How many are True, in all or in each segment."""
    return np.count_nonzero(mask) if starts is None else np.add.reduceat(mask, starts, dtype=np.int64)


def _sum_of_squares(values: np.ndarray, starts: np.ndarray | None) -> np.ndarray | float:
    """float64; fp32 dot products are kept only where none overflowed and none can have lost small squares."""
    if starts is not None:
        return np.add.reduceat(np.square(values, dtype=np.float64), starts)
    whole = values.size // BLOCK * BLOCK
    blocks = values[:whole].reshape(-1, BLOCK)
    dots, rest = np.vecdot(blocks, blocks), values[whole:]
    total = float(dots.sum(dtype=np.float64)) + float(np.dot(rest, rest))
    # Squares below 2^-126 lose up to 2^-150 each; above the bound that is less than one rounding of the sum.
    if values.size * 2.0**-126 <= total < float("inf"):
        return total
    return np.square(values, dtype=np.float64).sum()


def _totals(table: np.ndarray) -> None:
    """Norms and the last row, from the rows before it."""
    floats = table.view(np.float64)
    table[-1] = table[:-1].sum(0)
    floats[-1, s.SUMSQ] = floats[:-1, s.SUMSQ].sum()
    floats[:, s.NORM] = np.sqrt(floats[:, s.SUMSQ])
    floats[-1, s.ABSMAX] = floats[:-1, s.ABSMAX].max(initial=0.0)
    bad = np.flatnonzero(table[:-1, s.NAN] + table[:-1, s.INF])
    table[-1, s.FIRST_NONFINITE] = bad[0] if bad.size else -1
