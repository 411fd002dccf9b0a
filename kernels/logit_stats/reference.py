"""The layout of a slot's counters, and the definition of logit statistics in plain torch."""

import numpy as np
import torch

from kernels.dispatch import FLOAT_DTYPES
from kernels.float_bits import BEYOND_FP16, bit_limit, bits_of, extremes, fp32_bits, unsigned
from kernels.float_formats import FP16

# Counters of a slot, all int64. KEY packs (fp32 bits of |x|) << 32 | (2^32 - 1 - flat index); 0 is "nothing seen".
KEY, NAN, POS_INF, NEG_INF, OVER_FP16, BAD_TARGETS = range(6)
COUNTERS = 8
CACHED = 2**16  # elements
FP16_MAX_BITS = {dtype: bit_limit(BEYOND_FP16, dtype) - 1 for dtype in FLOAT_DTYPES}
"""The bits of a dtype's largest number up to 65,504."""


def accumulate(counters: torch.Tensor, x: torch.Tensor, keep: torch.Tensor | None = None, width: int | None = None) -> None:
    """Fold x (rows, columns) of any float dtype into a slot's `counters`, int64 (8,).

    keep   bool (rows,): rows that count; None is all
    width  columns of the matrix that x is the left part of (pad columns cut off)
    """
    rows, columns = x.shape
    width = width or columns
    if rows == 0:
        return
    if x.device.type == "cpu" and _fold_ordinary(counters, x, keep, width):
        return
    x = x.detach()
    # Two reductions: `aminmax(dim=1)` is five times slower than both on a CPU.
    top = torch.maximum(-x.amin(dim=1), x.amax(dim=1)).float()  # (rows,) largest |x|; NaN where the row holds one
    odd = ~(top <= FP16.max)
    if keep is not None:
        odd &= keep
    # A row is looked at element by element only where it must be. On a CPU the rows are picked,
    # elsewhere picking would need a sync, so that every row is looked at.
    picked = odd.nonzero().squeeze(1) if x.device.type == "cpu" else torch.arange(rows, device=x.device)
    if picked.numel():
        top = top.index_copy(0, picked, _count(counters, x.index_select(0, picked), odd.index_select(0, picked)))
    if keep is not None:
        top = top.masked_fill(~keep, -1.0)
    best, row = top.max(dim=0)  # the first of equal maxima on a CPU
    row = (top == best).to(torch.int32).argmax(dim=0, keepdim=True)
    column = (x.index_select(0, row).squeeze(0).abs() == best).to(torch.int32).argmax()
    bits = best.abs().view(torch.int32).to(torch.int64)  # abs: the maximum of 0.0 and -0.0 may be -0.0
    key = bits * 2**32 + (0xFFFFFFFF - (row.squeeze(0) * width + column))
    counters[KEY].copy_(torch.maximum(counters[KEY], torch.where(best >= 0, key, 0)))


def _fold_ordinary(counters: torch.Tensor, x: torch.Tensor, keep: torch.Tensor | None, width: int) -> bool:
    """The common case on a CPU, in a tenth of the time: nothing beyond fp16. False: nothing was done."""
    bits = bits_of(x)
    rows = None if keep is None else np.flatnonzero(keep.numpy())
    per = max(1, CACHED // bits.shape[1])  # rows that stay in a cache
    top, first = -1, 0
    for start in range(0, len(bits) if rows is None else len(rows), per):
        largest = max(extremes(_rows(bits, rows, start, per)))
        if largest > top:
            top, first = largest, start
    if top > FP16_MAX_BITS[x.dtype]:
        return False
    if top < 0:  # no row is kept
        return True
    best = _rows(bits, rows, first, per)
    positive, negative = extremes(best)
    # The first of equal maxima, whatever their signs.
    signed = [best] * (positive == top) + [unsigned(best)] * (negative == top)
    row, column = divmod(min(int(b.argmax()) for b in signed), bits.shape[1])
    row = first + row if rows is None else int(rows[first + row])
    key = (fp32_bits(top, x.dtype) << 32) + (0xFFFFFFFF - (row * width + column))
    slot = counters.numpy()
    slot[KEY] = max(int(slot[KEY]), key)
    return True


def _rows(bits: np.ndarray, rows: np.ndarray | None, start: int, count: int) -> np.ndarray:
    """`count` rows from the `start`-th on, of all or of those listed."""
    return bits[start : start + count] if rows is None else bits[rows[start : start + count]]


def _count(counters: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Add the unusual values of the rows where `counts` to `counters`; return each row's largest finite |x|, or -1."""
    x = x.float()  # in bf16 the constant 65,504 itself would round to 65,536
    size = x.abs()
    finite = size < torch.inf
    counts = counts.unsqueeze(1)
    counters[NAN] += (x.isnan() & counts).sum()
    counters[POS_INF] += ((x == torch.inf) & counts).sum()
    counters[NEG_INF] += ((x == -torch.inf) & counts).sum()
    counters[OVER_FP16] += ((size > FP16.max) & finite & counts).sum()
    return size.masked_fill(~finite, -1.0).amax(dim=1)
