"""The CPU path: cells written through numpy; "range" by two integer maxima (float_bits), "all" as multi_tensor_stats."""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.activation_stats import ring as r
from kernels.activation_stats.reference import JUST_OVER
from kernels.float_bits import finite_range
from kernels.multi_tensor_stats import stats as s
from kernels.multi_tensor_stats.host import host_table
from kernels.multi_tensor_stats.op import flat


def record_on_host(
    tensors: list[torch.Tensor], words: torch.Tensor, state: torch.Tensor, slots: Sequence[int], counts: str
) -> None:
    """Measure `tensors` and merge them into the cells of the running step, if it is measured."""
    enabled, now, record, _ = state.tolist()
    if not enabled:
        return
    cells = words.numpy()[record % len(words)]
    if counts == "range":
        for slot, x in zip(slots, tensors, strict=True):
            absmax, nan, inf = finite_range(x)
            cell = _opened(cells[slot], now, x.numel(), absmax)
            cell[r.RANGE_ONLY] = 1
            if nan or inf:
                cell[r.NAN] += nan
                cell[r.INF] += inf
        return
    table = host_table([x if x.is_contiguous() else flat(x.detach()) for x in tensors], JUST_OVER)
    for slot, row in zip(slots, table[:-1], strict=True):
        floats = row.view(np.float64)
        cell = _opened(cells[slot], now, row[s.NUMEL], floats[s.ABSMAX])
        cell.view(np.float64)[r.SUMSQ] += floats[s.SUMSQ]
        cell[r.NAN : r.FP16_SUBNORMAL + 1] += row[s.NAN : s.FP16_SUBNORMAL + 1]
        cell[r.OVER_FP16] += row[s.NUMEL] - row[s.NAN] - row[s.INF] - row[s.ZEROS] - row[s.BELOW]


def _opened(cell: np.ndarray, now: int, numel: int, absmax: float) -> np.ndarray:
    """The cell, cleared if an older step wrote it, with what every write merges."""
    if cell[r.STEP] != now:
        cell[:] = 0
        cell[r.STEP] = now
    cell[r.NUMEL] += numel
    floats = cell.view(np.float64)
    floats[r.ABSMAX] = max(floats[r.ABSMAX], absmax)
    return cell
