"""The kernel and its launcher: grid (shares, tensors); the last share of a tensor writes its cell."""

import torch
import triton
import triton.language as tl

from kernels.activation_stats import ring as r
from kernels.activation_stats.reference import JUST_OVER
from kernels.multi_tensor_stats import launch as stats_launch
from kernels.multi_tensor_stats.op import flat
from kernels.multi_tensor_stats.piece import piece_stats

TENSORS, SHARES = 8, 64  # at most, per launch and per tensor
SHARE = 1 << 14  # elements below which a tensor is not cut further
PACKED_LIMIT = SHARES << 20  # elements: the packed loop counts to 2,048 in each of 1,024 lanes
WITHIN = (stats_launch.round_up_fp32(JUST_OVER), *stats_launch.below_patterns(JUST_OVER))


@triton.jit
def _pick(i, a0, a1, a2, a3, a4, a5, a6, a7):
    low = tl.where(i < 2, tl.where(i == 0, a0, a1), tl.where(i == 2, a2, a3))
    high = tl.where(i < 6, tl.where(i == 4, a4, a5), tl.where(i == 6, a6, a7))
    return tl.where(i < 4, low, high)


@triton.jit
def _write_cell(cell, floats, ints, first, n, n_shares, now, SHARES: tl.constexpr, P_INTS: tl.constexpr, COUNTS: tl.constexpr):
    """Join the shares of one tensor, add to the cell if this step has written it before."""
    lanes = tl.arange(0, SHARES)
    columns = tl.arange(0, P_INTS)
    mask = lanes < n_shares
    at = floats + (first + lanes) * 2
    sumsq = tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    top = tl.max(tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    at = ints + (first + lanes[:, None]) * P_INTS + columns[None, :]
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
    words, state, floats, ints, steps, slots, dtypes, within, within_bf16, within_fp16,
    a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr, SHARE: tl.constexpr, SHARES: tl.constexpr,
    P_INTS: tl.constexpr, WORDS: tl.constexpr, FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr, PACKED: tl.constexpr,
    COUNTS: tl.constexpr,
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
            sumsq = tl.zeros((), tl.float64)
            top = tl.zeros((), tl.float32)
            nan = tl.zeros((), tl.int32)
            inf = nan
            zeros = nan
            flushed = nan
            tiny = nan
            inside = nan
            bad = nan
            if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
                if dtype == 0:
                    p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
                    sumsq, top, nan, inf, zeros, flushed, tiny, inside, bad = piece_stats(
                        p, m, 1.0, within, ROWS, THREADS, 4, TAIL, False, False, COUNTS, False
                    )
            if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
                if dtype == 1:
                    p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
                    sumsq, top, nan, inf, zeros, flushed, tiny, inside, bad = piece_stats(
                        p, m, 1.0, within, ROWS // 2, THREADS, 8, TAIL, False, False, COUNTS, PACKED, within_bf16
                    )
            if FP16:  # noqa: SIM102 (one known at compile time, one at run time)
                if dtype == 2:
                    p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
                    sumsq, top, nan, inf, zeros, flushed, tiny, inside, bad = piece_stats(
                        p, m, 1.0, within, ROWS // 2, THREADS, 8, TAIL, False, False, COUNTS, PACKED, within_fp16
                    )
            row = tensor * SHARES + share
            tl.store(floats + row * 2, sumsq)
            tl.store(floats + row * 2 + 1, top.to(tl.float64))
            part = ints + row * P_INTS
            tl.store(part, nan)
            tl.store(part + 1, inf)
            tl.store(part + 2, zeros)
            tl.store(part + 3, flushed)
            tl.store(part + 4, tiny)
            tl.store(part + 5, inside)
            tl.store(part + 6, 0)
            tl.store(part + 7, 0)
            tl.debug_barrier()
            ticket = ints + 8 * SHARES * P_INTS + tensor
            if tl.atomic_add(ticket, 1, sem="acq_rel") == n_shares - 1:
                tl.store(ticket, 0)
                record = tl.load(state + 2) % steps
                cell = words + (record * slots + slot) * WORDS
                _write_cell(cell, floats, ints, tensor * SHARES, n, n_shares, tl.load(state + 1), SHARES, P_INTS, COUNTS)


def launch_activation(tensors, words, state, floats, ints, slots, counts="all") -> int:
    """One launch for every 8 tensors; returns how many. A tensor that is not dense or not aligned is copied."""
    flats = [flat(x.detach()) for x in tensors]
    flats = [x if x.data_ptr() % 16 == 0 else x.clone() for x in flats]
    launches = 0
    for first in range(0, len(flats), TENSORS):
        group, cells = flats[first : first + TENSORS], slots[first : first + TENSORS]
        codes = [stats_launch.DTYPES[x.dtype] for x in group]
        longest = max(x.numel() for x in group)
        shares = min(SHARES, max(1, triton.cdiv(longest, SHARE)))
        addresses = [x.data_ptr() for x in group]
        addresses += addresses[:1] * (TENSORS - len(group))  # not 0: a small number would change the argument's type
        pad = [0] * (TENSORS - len(group))
        with torch.cuda.device_of(words):
            activation_kernel[(shares, len(group))](
                words, state, floats, ints, words.shape[0], words.shape[1],
                sum(code << 2 * i for i, code in enumerate(codes)), *WITHIN,
                *addresses, *[x.numel() for x in group], *pad, *cells, *pad,
                ROWS=stats_launch.ROWS, THREADS=stats_launch.THREADS, TAIL=stats_launch.TAIL, SHARE=SHARE,
                SHARES=SHARES, P_INTS=8, WORDS=r.WORDS,
                FP32=0 in codes, BF16=1 in codes, FP16=2 in codes,
                PACKED=longest <= PACKED_LIMIT and stats_launch.packs(None, JUST_OVER),
                COUNTS=counts == "all", num_warps=stats_launch.NUM_WARPS,
            )  # fmt: skip
        launches += 1
    return launches


def compile_specs():
    """Eight outputs of one dtype, and of all; with every count and without."""
    from kernels.compile import CompileSpec

    scalars = {f"{kind}{i}": "i64" if kind == "a" else "i32" for kind in "ans" for i in range(TENSORS)}
    mixes = {"fp32": (1, 0, 0), "bf16": (0, 1, 0), "fp16": (0, 0, 1), "mixed": (1, 1, 1)}
    return [
        CompileSpec(
            kernel="activation_stats" if counts else "activation_range",
            dtype=dtype,
            fn=lambda: activation_kernel,
            signature={
                "words": "*i64", "state": "*i64", "floats": "*fp64", "ints": "*i32",
                "steps": "i32", "slots": "i32", "dtypes": "i32", "within": "fp32",
                "within_bf16": "i32", "within_fp16": "i32", **scalars,
            },
            constexprs={
                "ROWS": stats_launch.ROWS, "THREADS": stats_launch.THREADS, "TAIL": stats_launch.TAIL,
                "SHARE": SHARE, "SHARES": SHARES, "P_INTS": 8, "WORDS": r.WORDS,
                "FP32": bool(mix[0]), "BF16": bool(mix[1]), "FP16": bool(mix[2]), "PACKED": True, "COUNTS": counts,
            },
            divisible=("words", "state", "floats", "ints"),
            num_warps=stats_launch.NUM_WARPS,
            streaming=True,
            shape="8 outputs 8192x768",
        )
        for counts in (True, False)
        for dtype, mix in mixes.items()
    ]  # fmt: skip
