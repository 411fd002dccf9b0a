"""The kernel and its launcher: grid (shares, tensors); the last share of a tensor writes its cell."""

import torch
import triton
import triton.language as tl

from kernels.activation_stats.reference import COLUMNS, SHARES, TENSORS
from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES
from kernels.float_bits import BEYOND_FP16
from kernels.multi_tensor_stats.triton_kernel import LISTS, NUM_WARPS, ROWS, TAIL, THREADS, packs, thresholds
from kernels.tensor_list import DTYPE_CODES, TILE_INTS, flat
from kernels.tile_stats import tile_stats_of

SHARE = 1 << 14  # elements below which a tensor is not cut further
PACKED_LIMIT = SHARES << 20  # elements: the packed loop counts to 2,048 in each of 1,024 lanes
WITHIN = thresholds(BEYOND_FP16)


@triton.jit
def _pick(i, a0, a1, a2, a3, a4, a5, a6, a7):
    low = tl.where(i < 2, tl.where(i == 0, a0, a1), tl.where(i == 2, a2, a3))
    high = tl.where(i < 6, tl.where(i == 4, a4, a5), tl.where(i == 6, a6, a7))
    return tl.where(i < 4, low, high)


@triton.jit
def _write_cell(
    cell, floats, ints, first, n, n_shares, now, SHARES: tl.constexpr, TILE_INTS: tl.constexpr, COUNTS: tl.constexpr
):
    """Join the shares of one tensor, add to the cell if this step has written it before."""
    lanes = tl.arange(0, SHARES)
    columns = tl.arange(0, TILE_INTS)
    mask = lanes < n_shares
    at = floats + (first + lanes) * 2
    sumsq = tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    top = tl.max(tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    at = ints + (first + lanes[:, None]) * TILE_INTS + columns[None, :]
    counts = tl.sum(tl.load(at, mask=mask[:, None], other=0, cache_modifier=".cg").to(tl.int64), 0)
    zeros = tl.sum(tl.where(columns == 2, counts, 0), 0)
    flushed = tl.sum(tl.where(columns == 3, counts, 0), 0)
    within = tl.sum(tl.where(columns == 5, counts, 0), 0)  # 0 < |x| <= 65,504
    unlike = tl.sum(tl.where(columns < 3, counts, 0), 0)  # NaN, Inf, zero
    counts -= tl.where(columns == 3, zeros, 0) + tl.where(columns == 4, flushed, 0)
    counts = tl.where(columns == 5, n - unlike - within, counts)
    counts = tl.where(columns == 6, n, counts)
    seen = tl.load(cell + 9) == now
    floats_of = cell.to(tl.pointer_type(tl.float64))
    before = tl.where(seen, tl.load(floats_of), 0.0)
    before_top = tl.where(seen, tl.load(floats_of + 1), 0.0)
    before_counts = tl.where(seen, tl.load(cell + 2 + columns, mask=columns < 7, other=0), 0)
    range_only = tl.where(seen, tl.load(cell + 10), 0) if COUNTS else 1
    tl.debug_barrier()
    tl.store(floats_of, before + sumsq)
    tl.store(floats_of + 1, tl.maximum(before_top, top))
    tl.store(cell + 2 + columns, before_counts + counts, mask=columns < 7)
    tl.store(cell + 9, now)
    tl.store(cell + 10, range_only)


@triton.jit(do_not_specialize=[
    "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7",
    "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "dtypes", "steps", "slots", "within_bf16", "within_fp16",
])  # fmt: skip
def activation_kernel(
    cells, state, floats, ints, steps, slots, dtypes, within, within_bf16, within_fp16,
    a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr, SHARE: tl.constexpr, SHARES: tl.constexpr,
    TILE_INTS: tl.constexpr, COLUMNS: tl.constexpr, FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    PACKED: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """a: addresses (16-byte aligned), n: elements, s: slots; dtypes: two bits for each tensor."""
    if tl.load(state) != 0:
        share = tl.program_id(0)
        tensor = tl.program_id(1)
        address = _pick(tensor, a0, a1, a2, a3, a4, a5, a6, a7)
        n = _pick(tensor, n0, n1, n2, n3, n4, n5, n6, n7)
        slot = _pick(tensor, s0, s1, s2, s3, s4, s5, s6, s7)
        # Shares are whole multiples of SHARE elements, so that each begins on 16 bytes.
        length = tl.cdiv(tl.cdiv(n, SHARES), SHARE) * SHARE
        n_shares = tl.maximum(tl.cdiv(n, tl.maximum(length, 1)), 1).to(tl.int32)
        if share < n_shares:
            start = share.to(tl.int64) * length
            m = tl.minimum(length, n - start).to(tl.int32)
            dtype = (dtypes >> (2 * tensor)) & 3
            sumsq, top, nan, inf, zeros, flushed, tiny, inside, bad = tile_stats_of(
                address, start, m, dtype, 1.0, within, within_bf16, within_fp16,
                ROWS, THREADS, TAIL, FP32, BF16, FP16, False, False, COUNTS, PACKED,
            )  # fmt: skip
            row = tensor * SHARES + share
            tl.store(floats + row * 2, sumsq)
            tl.store(floats + row * 2 + 1, top.to(tl.float64))
            part = ints + row * TILE_INTS
            tl.store(part, nan)
            tl.store(part + 1, inf)
            tl.store(part + 2, zeros)
            tl.store(part + 3, flushed)
            tl.store(part + 4, tiny)
            tl.store(part + 5, inside)
            tl.store(part + 6, 0)
            tl.store(part + 7, 0)
            tl.debug_barrier()
            ticket = ints + 8 * SHARES * TILE_INTS + tensor
            if tl.atomic_add(ticket, 1, sem="acq_rel") == n_shares - 1:
                tl.store(ticket, 0)
                record = tl.load(state + 2) % steps
                cell = cells + (record * slots + slot) * COLUMNS
                _write_cell(cell, floats, ints, tensor * SHARES, n, n_shares, tl.load(state + 1), SHARES, TILE_INTS, COUNTS)


def launch_activation(tensors, cells, state, floats, ints, slots, counts="all") -> int:
    """One launch for every 8 tensors; returns how many. A tensor that is not dense or not aligned is copied."""
    flats = [flat(x.detach()) for x in tensors]
    flats = [x if x.data_ptr() % 16 == 0 else x.clone() for x in flats]
    launches = 0
    for first in range(0, len(flats), TENSORS):
        group, group_slots = flats[first : first + TENSORS], slots[first : first + TENSORS]
        codes = [DTYPE_CODES[x.dtype] for x in group]
        longest = max(x.numel() for x in group)
        shares = min(SHARES, max(1, triton.cdiv(longest, SHARE)))
        addresses = [x.data_ptr() for x in group]
        addresses += addresses[:1] * (TENSORS - len(group))  # not 0: a small number would change the argument's type
        pad = [0] * (TENSORS - len(group))
        with torch.cuda.device_of(cells):
            activation_kernel[(shares, len(group))](
                cells, state, floats, ints, cells.shape[0], cells.shape[1],
                sum(code << 2 * i for i, code in enumerate(codes)), *WITHIN,
                *addresses, *[x.numel() for x in group], *pad, *group_slots, *pad,
                ROWS=ROWS, THREADS=THREADS, TAIL=TAIL, SHARE=SHARE, SHARES=SHARES, TILE_INTS=TILE_INTS, COLUMNS=COLUMNS,
                FP32=0 in codes, BF16=1 in codes, FP16=2 in codes,
                PACKED=longest <= PACKED_LIMIT and packs(None, BEYOND_FP16),
                COUNTS=counts == "all", num_warps=NUM_WARPS,
            )  # fmt: skip
        launches += 1
    return launches


def compile_specs() -> list[CompileSpec]:
    """Eight outputs of one dtype, and of all; with every count and without. On a CPU, for their addresses; never touched."""
    cells, state, floats, ints = (torch.empty(64, 8, COLUMNS, dtype=torch.int64), torch.empty(4, dtype=torch.int64),
                                  torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int32))  # fmt: skip
    specs = []
    for counts, name in (("all", "activation_stats"), ("range", "activation_range")):
        for dtype, dtypes in LISTS.items():
            outputs = [torch.empty(8192, 768, dtype=DTYPES[dtypes[i % len(dtypes)]]) for i in range(TENSORS)]
            label = (name, dtype, "8 outputs 8192x768")
            specs += as_launched([label], launch_activation, outputs, cells, state, floats, ints, range(TENSORS), counts)
    return specs
