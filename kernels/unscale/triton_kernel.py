"""The launcher: multi_tensor_stats' kernel unscales and measures; with `clip` scale_'s kernel unscales and clips after it."""

import torch

from kernels.compile import CompileSpec, as_launched
from kernels.multi_tensor_stats.reference import TensorStats
from kernels.multi_tensor_stats.triton_kernel import launch_stats, list_on_meta, table_on_meta
from kernels.scale.triton_kernel import launch_over
from kernels.tensor_list import TensorTables, copy_back, flat


def launch_unscale(
    grads: list[torch.Tensor],
    table: torch.Tensor,
    inv_scale_at: torch.Tensor | None,
    inv_scale: float,
    below_at: torch.Tensor | None,
    below: float,
    max_norm: float | None,
    clip: bool,
) -> TensorTables | None:
    """Grads (any strides; a copy and back where they are not dense) in place. Returns their tables, None for no grads."""
    flats = [flat(g) for g in grads]
    tables = launch_stats(
        flats, table, below_at, below, True, inv_scale_at=inv_scale_at, inv_scale=inv_scale, max_norm=max_norm, scale=True,
        store=not clip,
    )  # fmt: skip
    if clip and tables is not None:
        launch_over(tables, TensorStats(table).clip_factor, inv_scale_at, inv_scale)
    copy_back(grads, flats)
    return tables


def compile_specs() -> list[CompileSpec]:
    """The pass that unscales in place; the one that only measures what unscaling would give, and the clip after it."""
    specs, inv_scale, shape = [], torch.empty((), device="meta"), "124M in 148 tensors"
    for dtype, dtypes in {"fp32": ("fp32",), "bf16": ("bf16",), "mixed": ("fp32", "bf16")}.items():
        for labels, clip in (["unscale_in_place"], False), (["unscale_measure", "unscale_clip"], True):
            specs += as_launched(
                [(label, dtype, shape) for label in labels], launch_unscale,
                list_on_meta(dtypes), table_on_meta(), inv_scale, 1.0, None, 2.0**-24, 1.0, clip,
            )  # fmt: skip
    return specs
