"""Statistics of tensors of which every rank has a slice: one exchange, no host sync."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kernels import TensorStats
from kernels.multi_tensor_stats.stats import ABSMAX, FIRST_NONFINITE, FOUND_INF_F32, NAN, NORM, NOT_COUNTED, NUMEL, SUMSQ

NOBODY = torch.iinfo(torch.int64).max


def over_ranks(mine: TensorStats) -> TensorStats:
    """The statistics of the whole tensors from those of this rank's slices, the same on every rank."""
    world = dist.get_world_size()
    gathered = torch.empty((world, *mine.words.shape), dtype=torch.int64, device=mine.words.device)
    dist.all_gather(list(gathered.unbind()), mine.words.contiguous())
    words = gathered[0].clone()
    floats, all_floats = words.view(torch.float64), gathered.view(torch.float64)
    floats[:, SUMSQ] = all_floats[..., SUMSQ].sum(0)
    floats[:, NORM] = floats[:, SUMSQ].sqrt()
    floats[:, ABSMAX] = all_floats[..., ABSMAX].amax(0)
    counts = slice(NAN, NUMEL + 1)  # NaN, infinities, zeros, what fp16 would flush, elements
    words[:, counts] = torch.where(words[:, counts] == NOT_COUNTED, NOT_COUNTED, gathered[..., counts].sum(0))
    firsts = gathered[:, -1, FIRST_NONFINITE]
    first = torch.where(firsts < 0, NOBODY, firsts).amin()
    words[-1, FIRST_NONFINITE] = torch.where(first == NOBODY, -1, first)
    found = gathered.view(torch.float32)[:, -1, FOUND_INF_F32]
    words.view(torch.float32)[-1, FOUND_INF_F32] = found.amax()
    return TensorStats(words)
