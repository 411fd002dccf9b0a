"""The layout of a cell, and the definition of its figures in plain torch and float64; on a CPU, through numpy."""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.float_bits import BEYOND_FP16, finite_range
from kernels.multi_tensor_stats import reference as s
from kernels.multi_tensor_stats.cpu import cpu_table
from kernels.tensor_list import flats_of

# Columns of a cell; SUMSQ and ABSMAX are float64 bits. STEP is 0 in a cell that nobody wrote.
# RANGE_ONLY is 1 where some write left out the counts: then they are missing from the cell as a whole.
SUMSQ, ABSMAX, NAN, INF, ZEROS, FP16_FLUSH, FP16_SUBNORMAL, OVER_FP16, NUMEL, STEP, RANGE_ONLY = range(11)
COLUMNS = 12
TENSORS, SHARES = 8, 64  # at most, of a launch and of a tensor


def record_cells(tensors: list[torch.Tensor], cells: torch.Tensor, state: torch.Tensor, slots: list[int], counts: str) -> None:
    """Measure `tensors` and add them to the cells of the running step. Reads the state, a sync."""
    enabled, now, record, _ = state.tolist()
    if not enabled:
        return
    out = s.TensorStats.allocate(len(tensors), cells.device)
    s.reference_stats([x.detach() for x in tensors], out, BEYOND_FP16)
    floats = cells.view(torch.float64)
    for slot, row, row_f in zip(slots, out.table[:-1], out.table[:-1].view(torch.float64), strict=True):
        cell, cell_f = cells[record % len(cells), slot], floats[record % len(cells), slot]
        if cell[STEP] != now:
            cell.zero_()
        cell_f[SUMSQ] += row_f[s.SUMSQ]
        cell_f[ABSMAX] = torch.maximum(cell_f[ABSMAX], row_f[s.ABSMAX])
        cell[NAN : FP16_SUBNORMAL + 1] += row[s.NAN : s.FP16_SUBNORMAL + 1]
        finite_nonzero = row[s.NUMEL] - row[s.NAN] - row[s.INF] - row[s.ZEROS]
        cell[OVER_FP16] += finite_nonzero - row[s.BELOW]
        cell[NUMEL] += row[s.NUMEL]
        cell[STEP] = now
        cell[RANGE_ONLY] |= counts == "range"


def record_on_cpu(
    tensors: list[torch.Tensor], cells: torch.Tensor, state: torch.Tensor, slots: Sequence[int], counts: str
) -> None:
    """Measure `tensors` and merge them into the cells of the running step, if it is measured."""
    enabled, now, record, _ = state.tolist()
    if not enabled:
        return
    row = cells.numpy()[record % len(cells)]
    if counts == "range":
        for slot, x in zip(slots, tensors, strict=True):
            absmax, nan, inf = finite_range(x)
            cell = _opened(row[slot], now, x.numel(), absmax)
            cell[RANGE_ONLY] = 1
            if nan or inf:
                cell[NAN] += nan
                cell[INF] += inf
        return
    table = cpu_table(flats_of(tensors), BEYOND_FP16)
    for slot, figures in zip(slots, table[:-1], strict=True):
        floats = figures.view(np.float64)
        cell = _opened(row[slot], now, figures[s.NUMEL], floats[s.ABSMAX])
        cell.view(np.float64)[SUMSQ] += floats[s.SUMSQ]
        cell[NAN : FP16_SUBNORMAL + 1] += figures[s.NAN : s.FP16_SUBNORMAL + 1]
        not_over = figures[s.NAN] + figures[s.INF] + figures[s.ZEROS] + figures[s.BELOW]
        cell[OVER_FP16] += figures[s.NUMEL] - not_over


def _opened(cell: np.ndarray, now: int, numel: int, absmax: float) -> np.ndarray:
    """The cell, cleared if an older step wrote it, with what every write merges."""
    if cell[STEP] != now:
        cell[:] = 0
        cell[STEP] = now
    cell[NUMEL] += numel
    floats = cell.view(np.float64)
    floats[ABSMAX] = max(floats[ABSMAX], absmax)
    return cell
