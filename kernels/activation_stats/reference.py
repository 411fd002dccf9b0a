"""The definition in plain torch and float64; a CPU takes host.py."""

import torch

from kernels.activation_stats import ring as r
from kernels.multi_tensor_stats import stats as s
from kernels.multi_tensor_stats.reference import reference_stats

JUST_OVER = 65504.001  # no bf16, fp16 or fp32 number lies between 65,504 and this


def record_cells(tensors: list[torch.Tensor], words: torch.Tensor, state: torch.Tensor, slots: list[int], counts: str) -> None:
    """Measure `tensors` and add them to the cells of the running step. Reads the state, a sync."""
    enabled, now, record, _ = state.tolist()
    if not enabled:
        return
    out = s.TensorStats.allocate(len(tensors), words.device)
    reference_stats([x.detach() for x in tensors], out, JUST_OVER)
    floats = words.view(torch.float64)
    for slot, row, row_f in zip(slots, out.words[:-1], out.words[:-1].view(torch.float64), strict=True):
        cell, cell_f = words[record % len(words), slot], floats[record % len(words), slot]
        if cell[r.STEP] != now:
            cell.zero_()
        cell_f[r.SUMSQ] += row_f[s.SUMSQ]
        cell_f[r.ABSMAX] = torch.maximum(cell_f[r.ABSMAX], row_f[s.ABSMAX])
        cell[r.NAN : r.FP16_SUBNORMAL + 1] += row[s.NAN : s.FP16_SUBNORMAL + 1]
        finite_nonzero = row[s.NUMEL] - row[s.NAN] - row[s.INF] - row[s.ZEROS]
        cell[r.OVER_FP16] += finite_nonzero - row[s.BELOW]
        cell[r.NUMEL] += row[s.NUMEL]
        cell[r.STEP] = now
        cell[r.RANGE_ONLY] |= counts == "range"
