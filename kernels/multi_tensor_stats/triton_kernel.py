"""The kernel: one program per piece; the last program of a tensor joins its pieces, the last of all the list.

A piece is at most PIECE elements of one tensor and starts on 16 bytes unless it is shorter than that (launch.py
cuts the pieces so). Raw pointers come from a table, because a list has any length and mix of dtypes.
"""

import triton
import triton.language as tl

from kernels.multi_tensor_stats.piece import piece_stats

# Columns of the table of tensors (int64, TENSOR_WORDS apart), and of the partial results of a piece.
TENSOR_WORDS = 8
P_FLOATS, P_INTS = 2, 8  # sumsq, absmax | nan, inf, zeros, flush, subnormal, below, nonfinite before unscaling


@triton.jit
def _join_tensor(
    floats, ints, words_i, words_f, tensor_bad, t, numel, first_piece, n_pieces,
    JOIN: tl.constexpr, COUNTS: tl.constexpr, P_FLOATS: tl.constexpr, P_INTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The row of tensor t, from its pieces in their order. `.cg`: other programs wrote them, L1 may be stale."""
    lanes = tl.arange(0, JOIN)
    sumsq = tl.zeros((JOIN,), tl.float64)
    top = tl.zeros((JOIN,), tl.float64)
    columns = tl.arange(0, P_INTS)
    counts = tl.zeros((JOIN, P_INTS), tl.int64)
    for start in range(0, n_pieces, JOIN):
        piece = first_piece + start + lanes
        mask = start + lanes < n_pieces
        sumsq += tl.load(floats + piece * P_FLOATS, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(top, tl.load(floats + piece * P_FLOATS + 1, mask=mask, other=0.0, cache_modifier=".cg"))
        at = ints + piece[:, None] * P_INTS + columns[None, :]
        counts += tl.load(at, mask=mask[:, None], other=0, cache_modifier=".cg").to(tl.int64)
    row_f = words_f + t * WORDS
    row_i = words_i + t * WORDS
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
    words_i, words_f, words_h, tensor_bad, n, max_norm,
    JOIN: tl.constexpr, COUNTS: tl.constexpr, WORDS: tl.constexpr,
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
        sumsq += tl.load(words_f + t * WORDS, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(top, tl.load(words_f + t * WORDS + 2, mask=mask, other=0.0, cache_modifier=".cg"))
        counted = mask[:, None] & (columns >= 3)[None, :] & (columns <= 9)[None, :]
        row = tl.load(words_i + t[:, None] * WORDS + columns[None, :], mask=counted, other=0, cache_modifier=".cg")
        counts += row
        nonfinite = tl.sum(tl.where((columns == 3) | (columns == 4), row, 0), 1)
        first = tl.minimum(first, tl.where(nonfinite > 0, t.to(tl.int64), n))
        bad += tl.load(tensor_bad + t, mask=mask, other=0, cache_modifier=".cg")
    row_f = words_f + n * WORDS
    row_i = words_i + n * WORDS
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
    tl.store(words_h + n * WORDS * 2 + 22, tl.where(tl.sum(bad, 0) > 0, 1.0, 0.0))
    tl.store(words_h + n * WORDS * 2 + 23, factor)


@triton.jit
def stats_kernel(
    tensors, pieces, floats, ints, tickets, tensor_bad, words_i, words_f, words_h,
    inv_scale_at, below_at, inv_scale, below, below_bf16, below_fp16, max_norm, n_tensors,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr, JOIN: tl.constexpr,
    TENSOR_WORDS: tl.constexpr, P_FLOATS: tl.constexpr, P_INTS: tl.constexpr, WORDS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
    INV_SCALE_AT: tl.constexpr, BELOW_AT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,). FP32, BF16, FP16: which dtypes occur in the list; code for others is not generated."""
    pid = tl.program_id(0)
    head = tl.load(pieces + pid * 2)
    start = tl.load(pieces + pid * 2 + 1)
    t = (head & 0xFFFFFFFF).to(tl.int32)
    n = (head >> 32).to(tl.int32)
    record = tensors + t * TENSOR_WORDS
    address = tl.load(record)
    dtype = tl.load(record + 4)
    if INV_SCALE_AT:
        inv_scale = tl.load(inv_scale_at)
    if BELOW_AT:
        below = tl.load(below_at)
    sumsq = tl.zeros((), tl.float64)
    top = tl.zeros((), tl.float32)
    nan = tl.zeros((), tl.int32)
    inf = nan
    zeros = nan
    flushed = nan
    tiny = nan
    under = nan
    bad = nan
    if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = piece_stats(
                p, n, inv_scale, below, ROWS, THREADS, 4, TAIL, SCALE, STORE, COUNTS, False
            )
    if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = piece_stats(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS, PACKED, below_bf16
            )
    if FP16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 2:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = piece_stats(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS, PACKED, below_fp16
            )
    tl.store(floats + pid * P_FLOATS, sumsq)
    tl.store(floats + pid * P_FLOATS + 1, top.to(tl.float64))
    part = ints + pid * P_INTS
    tl.store(part, nan)
    tl.store(part + 1, inf)
    tl.store(part + 2, zeros)
    tl.store(part + 3, flushed)
    tl.store(part + 4, tiny)
    tl.store(part + 5, under)
    tl.store(part + 6, bad)
    tl.store(part + 7, 0)
    n_pieces = tl.load(record + 3).to(tl.int32)  # read here, not above: the loop has no register to spare
    tl.debug_barrier()
    # acq_rel: whoever draws the last ticket sees the parts of all others. The last one also resets the counter.
    if tl.atomic_add(tickets + t, 1, sem="acq_rel") == n_pieces - 1:
        tl.store(tickets + t, 0)
        numel = tl.load(record + 1)
        first_piece = tl.load(record + 2).to(tl.int32)
        _join_tensor(
            floats, ints, words_i, words_f, tensor_bad, t, numel, first_piece, n_pieces,
            JOIN, COUNTS, P_FLOATS, P_INTS, WORDS,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(tickets + n_tensors, 1, sem="acq_rel") == n_tensors - 1:
            tl.store(tickets + n_tensors, 0)
            _join_list(words_i, words_f, words_h, tensor_bad, n_tensors, max_norm, JOIN, COUNTS, WORDS)


def compile_specs():
    """Read-only pass, per dtype alone and for a list that mixes all; with and without counts."""
    mixes = {"fp32": (1, 0, 0), "bf16": (0, 1, 0), "fp16": (0, 0, 1), "mixed": (1, 1, 1)}
    return [
        stats_spec("multi_tensor_stats" + ("" if counts else "_no_counts"), dtype, mix, counts=counts)
        for dtype, mix in mixes.items()
        for counts in (True, False)
    ]


def stats_spec(name, dtype, present, *, counts=True, scale=False, store=False):
    """The kernel as launch.py starts it for a list of these dtypes."""
    from kernels.compile import CompileSpec
    from kernels.multi_tensor_stats import launch
    from kernels.multi_tensor_stats.stats import WORDS

    types = {
        "tensors": "*i64", "pieces": "*i64", "floats": "*fp64", "ints": "*i32", "tickets": "*i32",
        "tensor_bad": "*i32", "words_i": "*i64", "words_f": "*fp64", "words_h": "*fp32",
        "inv_scale_at": "*fp32", "below_at": "*fp32",
    }  # fmt: skip
    scalars = {"below_bf16": "i32", "below_fp16": "i32", "n_tensors": "i32"}
    scalars |= dict.fromkeys(("inv_scale", "below", "max_norm"), "fp32")
    fp32, bf16, fp16 = map(bool, present)
    return CompileSpec(
        kernel=name,
        dtype=dtype,
        fn=lambda: stats_kernel,
        signature={**types, **scalars},
        constexprs={
            "ROWS": launch.rows(store), "THREADS": launch.THREADS, "TAIL": launch.TAIL, "JOIN": launch.JOIN,
            "TENSOR_WORDS": TENSOR_WORDS, "P_FLOATS": P_FLOATS, "P_INTS": P_INTS, "WORDS": WORDS,
            "FP32": fp32, "BF16": bf16, "FP16": fp16, "SCALE": scale, "STORE": store, "COUNTS": counts,
            "INV_SCALE_AT": scale, "BELOW_AT": False, "PACKED": True,
        },
        divisible=tuple(types),
        num_warps=launch.NUM_WARPS,
        streaming=True,
        shape="124M in 148 tensors",
    )  # fmt: skip
