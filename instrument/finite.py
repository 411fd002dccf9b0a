"""Which tensor of a list is the first non-finite one, as device scalars: nothing here waits for a GPU."""

from __future__ import annotations

import torch

from instrument.results.schemas import FirstNonfinite
from kernels import TensorStats, multi_tensor_stats

SPELLED = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg", "absmax2": "exp_avg_sq"}
"""bitsandbytes' names. Its 8-bit states are integers with fp32 block scales (``absmax1``, ``absmax2``): an
overflow shows in the scales, so those stand for them."""


def first_bad(kind: str, tensors: list[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """``{kind}_tensor``, the index of the first non-finite tensor or -1, and ``{kind}_nan``, how many NaN it
    holds beyond its infinities: float64 scalars."""
    if not tensors or (device.type == "cpu" and _all_finite(tensors)):
        return {
            f"{kind}_tensor": torch.full((), -1.0, dtype=torch.float64, device=device),
            f"{kind}_nan": torch.zeros((), dtype=torch.float64, device=device),
        }
    return first_of(kind, multi_tensor_stats(tensors, counts="none"))


def first_of(kind: str, stats: TensorStats) -> dict[str, torch.Tensor]:
    """The same from statistics that were taken already."""
    index = stats.first_nonfinite_index
    surplus = (stats.nan - stats.inf).index_select(0, index.clamp(min=0).view(1)).squeeze(0)
    return {f"{kind}_tensor": index, f"{kind}_nan": surplus}


def prevailing(nan_surplus: float) -> str:
    """The kind of a tensor with ``nan_surplus`` more NaN than infinities."""
    return "nan" if nan_surplus > 0 else "inf"


def float_states(
    optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], names: list[str]
) -> list[tuple[str, str, torch.Tensor]]:
    """(parameter name, state name, tensor) of every floating-point state but step counters."""
    return [
        (name, SPELLED.get(key, key), value)
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(value) and value.is_floating_point() and key not in ("step", "qmap1", "qmap2")
    ]


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """On a CPU, where reading a number is free, a finite norm proves a list finite at a tenth of the cost."""
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).isfinite().all())


def surfaced(
    step: int,
    phase: str,
    tensor: str,
    kind: str,
    *,
    module: str | None = None,
    microbatch: int | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> FirstNonfinite:
    """A failure as the counters show it; op, cause and headroom are the replay's to fill."""
    return FirstNonfinite(
        step=step,
        microbatch=microbatch,
        phase=phase,
        phase_surfaced=phase,
        module=module,
        op=None,
        tensor=tensor,
        source_tensor=None,
        kind=kind,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        cause=None,
        input_absmax=None,
        headroom_bits=None,
        rank=rank,
    )
