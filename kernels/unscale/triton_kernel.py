"""The kernel of scale_ and of the clip in unscale_and_stats_, one program per tile of a list, and the launchers of both:
multi_tensor_stats' kernel unscales and measures, and with `clip` scale_'s unscales and clips after it.
"""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.multi_tensor_stats.reference import TensorStats
from kernels.multi_tensor_stats.triton_kernel import LISTS, launch_stats, list_on_meta, table_on_meta
from kernels.tensor_list import TENSOR_COLUMNS, TensorTables, copy_back, flat, launched, tables_of
from kernels.tile_stats import rounded, widened

BLOCK, TAIL, NUM_WARPS = 4096, 512, 4


@triton.jit
def _product(x, first, factor, TWICE: tl.constexpr):
    """round(x factor); TWICE: round(round(x first) factor), the two roundings of unscale and clip."""
    if TWICE:
        y = rounded(widened(x) * first, x)
        return rounded(widened(y) * factor, x)
    else:
        return rounded(widened(x) * factor, x)


@triton.jit
def _scale_tile(p, n, first, factor, BLOCK: tl.constexpr, TAIL: tl.constexpr, TWICE: tl.constexpr):
    """n elements at p: whole blocks in 16-byte loads and stores, then the end under a mask."""
    lanes = tl.arange(0, BLOCK)
    whole = n - n % BLOCK
    for start in range(0, whole, BLOCK):
        block = p + tl.multiple_of(start, BLOCK)
        tl.store(block + lanes, _product(tl.load(block + lanes), first, factor, TWICE))
    ends = tl.arange(0, TAIL)
    for start in range(whole, n, TAIL):
        mask = start + ends < n
        x = tl.load(p + start + ends, mask=mask)
        tl.store(p + start + ends, _product(x, first, factor, TWICE), mask=mask)


@triton.jit
def scale_kernel(
    tensors, tiles, first_at, factor_at, first, n_tiles,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, TENSOR_COLUMNS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr, TWICE: tl.constexpr, FIRST_AT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,), last tile first: whatever measured the list just now left its end in the L2 cache."""
    tile = n_tiles - 1 - tl.program_id(0)
    head = tl.load(tiles + tile * 2)
    start = tl.load(tiles + tile * 2 + 1)
    n = (head >> 32).to(tl.int32)
    record = tensors + (head & 0xFFFFFFFF) * TENSOR_COLUMNS
    address = tl.load(record)
    dtype = tl.load(record + 4)
    factor = tl.load(factor_at)
    if FIRST_AT:
        first = tl.load(first_at)
    if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            _scale_tile(p, n, first, factor, BLOCK, TAIL, TWICE)
    if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            _scale_tile(p, n, first, factor, BLOCK, TAIL, TWICE)
    if FP16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 2:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
            _scale_tile(p, n, first, factor, BLOCK, TAIL, TWICE)


def launch_over(
    tables: TensorTables, factor: torch.Tensor, first_at: torch.Tensor | None = None, first: float | None = None
) -> TensorTables:
    """One launch over the tensors of `tables`: times `factor`, after a first product where `first` is given."""
    with torch.cuda.device_of(factor):
        scale_kernel[(tables.n_tiles,)](
            tables.tensors, tables.tiles, first_at, factor, 1.0 if first is None else float(first), tables.n_tiles,
            BLOCK=BLOCK, TAIL=TAIL, TENSOR_COLUMNS=TENSOR_COLUMNS, **tables.dtypes,
            TWICE=first is not None, FIRST_AT=first_at is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
    return launched(tables)


def launch_scale(tensors: list[torch.Tensor], factor: torch.Tensor) -> TensorTables:
    """Tensors (at least one; any strides, a copy and back where they are not dense) in place. Returns the tables."""
    flats = [flat(x) for x in tensors]
    tables = launch_over(tables_of(flats, factor.device), factor)
    copy_back(tensors, flats)
    return tables


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


def scale_specs() -> list[CompileSpec]:
    factor = torch.empty((), device="meta")
    return [
        as_launched([("scale", dtype, "124M in 148 tensors")], launch_scale, list_on_meta(dtypes), factor)[0]
        for dtype, dtypes in LISTS.items()
    ]


def unscale_specs() -> list[CompileSpec]:
    """The pass that unscales in place; the one that only measures what unscaling would give, and the clip after it."""
    specs, inv_scale, shape = [], torch.empty((), device="meta"), "124M in 148 tensors"
    for dtype, dtypes in {"fp32": ("fp32",), "bf16": ("bf16",), "mixed": ("fp32", "bf16")}.items():
        for labels, clip in (["unscale_in_place"], False), (["unscale_measure", "unscale_clip"], True):
            specs += as_launched(
                [(label, dtype, shape) for label in labels], launch_unscale,
                list_on_meta(dtypes), table_on_meta(), inv_scale, 1.0, None, 2.0**-24, 1.0, clip,
            )  # fmt: skip
    return specs
