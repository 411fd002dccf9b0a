"""The kernel and its launcher: one program per tile; the last program of a tensor joins its tiles, the last of all the list.

Raw pointers come from a table, because a list has any length and mix of dtypes.
"""

import torch
import triton
import triton.language as tl

from kernels import tensor_list
from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES
from kernels.float_bits import bit_limit, round_up
from kernels.multi_tensor_stats.reference import COLUMNS
from kernels.tensor_list import TENSOR_COLUMNS, TILE_FLOATS, TILE_INTS, TensorTables, flats_of, tables_of
from kernels.tile_stats import tile_stats_of

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
ROWS = 8  # 16-byte loads in flight per thread (fp32; half as many blocks of twice the elements for 16 bits)
TAIL, JOIN = 256, 64


@triton.jit
def _join_tensor(
    floats, ints, table_i, table_f, tensor_bad, t, numel, first_tile, n_tiles,
    JOIN: tl.constexpr, COUNTS: tl.constexpr, TILE_FLOATS: tl.constexpr, TILE_INTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The row of tensor t, from its tiles in their order. `.cg`: other programs wrote them, L1 may be stale."""
    lanes = tl.arange(0, JOIN)
    sumsq = tl.zeros((JOIN,), tl.float64)
    top = tl.zeros((JOIN,), tl.float64)
    columns = tl.arange(0, TILE_INTS)
    counts = tl.zeros((JOIN, TILE_INTS), tl.int64)
    for start in range(0, n_tiles, JOIN):
        tile = first_tile + start + lanes
        mask = start + lanes < n_tiles
        sumsq += tl.load(floats + tile * TILE_FLOATS, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(top, tl.load(floats + tile * TILE_FLOATS + 1, mask=mask, other=0.0, cache_modifier=".cg"))
        at = ints + tile[:, None] * TILE_INTS + columns[None, :]
        counts += tl.load(at, mask=mask[:, None], other=0, cache_modifier=".cg").to(tl.int64)
    row_f = table_f + t * COLUMNS
    row_i = table_i + t * COLUMNS
    total = tl.sum(sumsq, 0)
    tl.store(row_f + 0, total)
    tl.store(row_f + 1, tl.sqrt(total))
    tl.store(row_f + 2, tl.max(top, 0))
    sums = tl.sum(counts, 0)
    zeros = tl.sum(tl.where(columns == 2, sums, 0), 0)
    flushed = tl.sum(tl.where(columns == 3, sums, 0), 0)
    # zeros are among the flushed, and the flushed among the tiny, as counted; the result keeps them apart
    sums = sums - tl.where(columns == 3, zeros, 0) - tl.where(columns == 4, flushed, 0)
    if not COUNTS:
        sums = tl.where((columns >= 2) & (columns <= 5), -1, sums)
    tl.store(row_i + 3 + columns, sums, mask=columns < 6)
    tl.store(tensor_bad + t + columns * 0, sums.to(tl.int32), mask=columns == 6)
    tl.store(row_i + 9, numel)
    tl.store(row_i + 10, numel * 0)
    tl.store(row_i + 11, numel * 0)


@triton.jit
def _join_list(
    table_i, table_f, table_h, tensor_bad, n, max_norm,
    JOIN: tl.constexpr, COUNTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last row, from the rows before it."""
    lanes = tl.arange(0, JOIN)
    columns = tl.arange(0, 16)
    sumsq = tl.zeros((JOIN,), tl.float64)
    top = tl.zeros((JOIN,), tl.float64)
    counts = tl.zeros((JOIN, 16), tl.int64)
    first = tl.zeros((JOIN,), tl.int64) + n
    bad = tl.zeros((JOIN,), tl.int32)
    for start in range(0, n, JOIN):
        t = start + lanes
        mask = t < n
        sumsq += tl.load(table_f + t * COLUMNS, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(top, tl.load(table_f + t * COLUMNS + 2, mask=mask, other=0.0, cache_modifier=".cg"))
        counted = mask[:, None] & (columns >= 3)[None, :] & (columns <= 9)[None, :]
        row = tl.load(table_i + t[:, None] * COLUMNS + columns[None, :], mask=counted, other=0, cache_modifier=".cg")
        counts += row
        nonfinite = tl.sum(tl.where((columns == 3) | (columns == 4), row, 0), 1)
        first = tl.minimum(first, tl.where(nonfinite > 0, t.to(tl.int64), n))
        bad += tl.load(tensor_bad + t, mask=mask, other=0, cache_modifier=".cg")
    row_f = table_f + n * COLUMNS
    row_i = table_i + n * COLUMNS
    total = tl.sum(sumsq, 0)
    norm = tl.sqrt(total)
    tl.store(row_f + 0, total)
    tl.store(row_f + 1, norm)
    tl.store(row_f + 2, tl.max(top, 0))
    sums = tl.sum(counts, 0)
    if not COUNTS:
        sums = tl.where((columns >= 5) & (columns <= 8), -1, sums)
    tl.store(row_i + columns, sums, mask=(columns >= 3) & (columns <= 9))
    index = tl.min(first, 0)
    tl.store(row_i + 10, tl.where(index == n, -1, index))
    # As clip_grad_norm_: number / tensor is reciprocal times number. A NaN factor stays NaN.
    factor = tl.div_rn(1.0, norm.to(tl.float32) + 1e-6) * max_norm
    factor = tl.where((factor > 1.0) | (max_norm < 0.0), 1.0, factor)
    tl.store(table_h + n * COLUMNS * 2 + 22, tl.where(tl.sum(bad, 0) > 0, 1.0, 0.0))
    tl.store(table_h + n * COLUMNS * 2 + 23, factor)


@triton.jit
def stats_kernel(
    tensors, tiles, floats, ints, tickets, tensor_bad, table_i, table_f, table_h,
    inv_scale_at, below_at, inv_scale, below, below_bf16, below_fp16, max_norm, n_tensors,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr, JOIN: tl.constexpr,
    TENSOR_COLUMNS: tl.constexpr, TILE_FLOATS: tl.constexpr, TILE_INTS: tl.constexpr, COLUMNS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
    INV_SCALE_AT: tl.constexpr, BELOW_AT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,)."""
    pid = tl.program_id(0)
    head = tl.load(tiles + pid * 2)
    start = tl.load(tiles + pid * 2 + 1)
    t = (head & 0xFFFFFFFF).to(tl.int32)
    n = (head >> 32).to(tl.int32)
    record = tensors + t * TENSOR_COLUMNS
    address = tl.load(record)
    dtype = tl.load(record + 4)
    if INV_SCALE_AT:
        inv_scale = tl.load(inv_scale_at)
    if BELOW_AT:
        below = tl.load(below_at)
    sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = tile_stats_of(
        address, start, n, dtype, inv_scale, below, below_bf16, below_fp16,
        ROWS, THREADS, TAIL, FP32, BF16, FP16, SCALE, STORE, COUNTS, PACKED,
    )  # fmt: skip
    tl.store(floats + pid * TILE_FLOATS, sumsq)
    tl.store(floats + pid * TILE_FLOATS + 1, top.to(tl.float64))
    part = ints + pid * TILE_INTS
    tl.store(part, nan)
    tl.store(part + 1, inf)
    tl.store(part + 2, zeros)
    tl.store(part + 3, flushed)
    tl.store(part + 4, tiny)
    tl.store(part + 5, under)
    tl.store(part + 6, bad)
    tl.store(part + 7, 0)
    n_tiles = tl.load(record + 3).to(tl.int32)  # read here, not above: the loop has no register to spare
    tl.debug_barrier()
    # acq_rel: whoever draws the last ticket sees the parts of all others. The last one also resets the counter.
    if tl.atomic_add(tickets + t, 1, sem="acq_rel") == n_tiles - 1:
        tl.store(tickets + t, 0)
        numel = tl.load(record + 1)
        first_tile = tl.load(record + 2).to(tl.int32)
        _join_tensor(
            floats, ints, table_i, table_f, tensor_bad, t, numel, first_tile, n_tiles,
            JOIN, COUNTS, TILE_FLOATS, TILE_INTS, COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(tickets + n_tensors, 1, sem="acq_rel") == n_tensors - 1:
            tl.store(tickets + n_tensors, 0)
            _join_list(table_i, table_f, table_h, tensor_bad, n_tensors, max_norm, JOIN, COUNTS, COLUMNS)


def rows_in_flight(store: bool) -> int:
    """Loads in flight per thread: half as many where a store follows each, or registers spill."""
    return ROWS // 2 if store else ROWS


def packs(below_at: torch.Tensor | None, below: float) -> bool:
    """Whether 16-bit tensors take the packed loop: its threshold is a host number that fp16 patterns can order."""
    return below_at is None and 0 <= below <= 2.0**100


def thresholds(below: float) -> tuple[float, int, int]:
    """The threshold in fp32, and its bits in both halves of an int32, in bf16 and in fp16."""
    clamped = min(max(below, 0.0), 2.0**100)
    patterns = (bit_limit(clamped, dtype) * 0x10001 for dtype in (torch.bfloat16, torch.float16))
    return round_up(below, torch.float32), *patterns


def launch_stats(
    tensors: list[torch.Tensor],
    table: torch.Tensor,
    below_at: torch.Tensor | None,
    below: float,
    counts: bool,
    inv_scale_at: torch.Tensor | None = None,
    inv_scale: float = 1.0,
    max_norm: float | None = None,
    scale: bool = False,
    store: bool = False,
) -> TensorTables | None:
    """One launch for the whole list (none for an empty one). Returns its tables."""
    tensor_list.last_tables = None
    if not tensors:
        table.zero_()
        table[-1, -2] = -1  # first_nonfinite_index: none
        table.view(torch.float32)[-1, -1] = 1.0  # clip_factor
        return None
    flats = flats_of(tensors)  # kept until the launch: some are copies, and the tables hold addresses only
    tables = tables_of(flats, table.device)
    f64, f32 = table.view(torch.float64), table.view(torch.float32)
    with torch.cuda.device_of(table):
        stats_kernel[(tables.n_tiles,)](
            tables.tensors, tables.tiles, tables.floats, tables.ints, tables.tickets, tables.tensor_bad, table, f64, f32,
            f32 if inv_scale_at is None else inv_scale_at, f32 if below_at is None else below_at,
            float(inv_scale), *thresholds(below), -1.0 if max_norm is None else float(max_norm), len(tensors),
            ROWS=rows_in_flight(store), THREADS=THREADS, TAIL=TAIL, JOIN=JOIN,
            TENSOR_COLUMNS=TENSOR_COLUMNS, TILE_FLOATS=TILE_FLOATS, TILE_INTS=TILE_INTS, COLUMNS=COLUMNS,
            **tables.dtypes, SCALE=scale, STORE=store, COUNTS=counts,
            INV_SCALE_AT=inv_scale_at is not None, BELOW_AT=below_at is not None,
            PACKED=packs(below_at, below), num_warps=NUM_WARPS,
        )  # fmt: skip
    return tensor_list.launched(tables)


LISTS = {"fp32": ("fp32",), "bf16": ("bf16",), "fp16": ("fp16",), "mixed": tuple(DTYPES)}
"""What every op on lists is compiled for: each dtype alone, and a list that mixes all."""


def list_on_meta(dtypes: tuple[str, ...]) -> list[torch.Tensor]:
    """147 tensors (as in GPT-2, but one) without memory, their dtypes in turns."""
    return [torch.empty(768, 768, dtype=DTYPES[dtypes[i % len(dtypes)]], device="meta") for i in range(147)]


def table_on_meta() -> torch.Tensor:
    return torch.empty(148, COLUMNS, dtype=torch.int64, device="meta")


def compile_specs() -> list[CompileSpec]:
    """The read-only pass, with and without counts."""
    return [
        as_launched(
            [("multi_tensor_stats" if counts else "multi_tensor_stats_no_counts", dtype, "124M in 148 tensors")],
            launch_stats, list_on_meta(dtypes), table_on_meta(), None, 2.0**-24, counts,
        )[0]
        for dtype, dtypes in LISTS.items()
        for counts in (True, False)
    ]  # fmt: skip
