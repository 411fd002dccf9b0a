"""The kernel: one program per piece; the last program of a tensor joins its pieces, the last of all the list.

A piece is at most PIECE elements of one tensor; all but its last BLOCK are whole blocks, 16-byte aligned
(launch.py cuts the pieces so). Raw pointers come from a table, because a list has any length and mix of dtypes.
"""

import triton
import triton.language as tl

from kernels.dispatch import interpreted

# Columns of the table of tensors (int64, TENSOR_WORDS apart), and of the partial results of a piece.
TENSOR_WORDS = 8
P_FLOATS, P_INTS = 2, 8  # sumsq, absmax | nan, inf, zeros, flush, subnormal, below, nonfinite before unscaling


# Triton's interpreter truncates where the GPU rounds fp32 to bf16, and turns subnormal bf16 into 0: there, by hand.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(x, like):
    """fp32 x in the dtype of `like`, to nearest, ties to even."""
    if _INTERPRETED and like.dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, bits.to(tl.float32, bitcast=True)).to(like.dtype)
    else:
        return x.to(like.dtype)


@triton.jit
def widened(x):
    """x as fp32, exactly."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _magnitudes(p, offsets, mask, inv_scale, MASKED: tl.constexpr, SCALE: tl.constexpr, STORE: tl.constexpr):
    """|x| as read, and |y| after unscaling and rounding to the dtype, both fp32."""
    x = tl.load(p + offsets, mask=mask, other=0.0) if MASKED else tl.load(p + offsets)
    raw = tl.abs(widened(x))
    if SCALE:
        y = rounded(widened(x) * inv_scale, x)
        if STORE:
            if MASKED:
                tl.store(p + offsets, y, mask=mask)
            else:
                tl.store(p + offsets, y)
        return raw, tl.abs(widened(y))
    return raw, raw


@triton.jit
def _ones(hit, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """How many are true, per thread. A comparison that yields 1.0 and an fp32 add are one instruction each."""
    return _fold(tl.where(hit, 1.0, 0.0), ROWS, THREADS, VEC)


@triton.jit
def _fold(x, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Sum of what one thread holds of a (ROWS, THREADS * VEC) block: no shuffles, and one register per accumulator."""
    return tl.sum(tl.sum(tl.reshape(x, (ROWS, THREADS, VEC)), 2), 0)


@triton.jit
def _fast(
    p, n, inv_scale, below, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Whole blocks of ROWS x THREADS x VEC elements; VEC of them are one 16-byte load."""
    offsets = tl.arange(0, ROWS)[:, None] * (THREADS * VEC) + tl.arange(0, THREADS * VEC)[None, :]
    sumsq = tl.zeros((THREADS,), tl.float32)
    top = tl.zeros((THREADS,), tl.float32)
    zeros = tl.zeros((THREADS,), tl.float32)  # counts are exact in fp32 up to 2^24, a piece is smaller
    flushed = tl.zeros((THREADS,), tl.float32)
    tiny = tl.zeros((THREADS,), tl.float32)
    under = tl.zeros((THREADS,), tl.float32)
    raw_zeros = tl.zeros((THREADS,), tl.float32)
    bad = tl.zeros((THREADS,), tl.float32)
    for start in range(0, n, ROWS * THREADS * VEC):
        block = p + tl.multiple_of(start, ROWS * THREADS * VEC)
        raw, a = _magnitudes(block, offsets, None, inv_scale, False, SCALE, STORE)
        sumsq += _fold(a * a, ROWS, THREADS, VEC)
        top = tl.maximum(top, tl.max(tl.max(tl.reshape(a, (ROWS, THREADS, VEC)), 2), 0))
        if COUNTS:
            zeros += _ones(a == 0.0, ROWS, THREADS, VEC)
            flushed += _ones(a <= 2.0**-25, ROWS, THREADS, VEC)
            tiny += _ones(a < 2.0**-14 - 2.0**-25, ROWS, THREADS, VEC)
            under += _ones(raw < below, ROWS, THREADS, VEC)
            if SCALE:
                raw_zeros += _ones(raw == 0.0, ROWS, THREADS, VEC)
        if STORE:  # the raw values are gone when a piece is read again
            bad += _ones((raw < float("inf")) == 0, ROWS, THREADS, VEC)
    if not SCALE:
        raw_zeros = zeros
    return (
        tl.sum(sumsq.to(tl.float64), 0), tl.max(top, 0),
        tl.sum(zeros, 0).to(tl.int32), tl.sum(flushed, 0).to(tl.int32), tl.sum(tiny, 0).to(tl.int32),
        tl.sum(tl.maximum(under - raw_zeros, 0.0), 0).to(tl.int32), tl.sum(bad, 0).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _careful(p, first, n, inv_scale, below, BLOCK: tl.constexpr, SCALE: tl.constexpr, STORE: tl.constexpr):
    """Elements [first, n): masked, squares in float64, every count. For ends, and for pieces _fast cannot vouch for."""
    lanes = tl.arange(0, BLOCK)
    sumsq = tl.zeros((BLOCK,), tl.float64)
    top = tl.zeros((BLOCK,), tl.float32)
    nan = tl.zeros((BLOCK,), tl.int32)
    inf = tl.zeros((BLOCK,), tl.int32)
    zeros = tl.zeros((BLOCK,), tl.int32)
    flushed = tl.zeros((BLOCK,), tl.int32)
    tiny = tl.zeros((BLOCK,), tl.int32)
    under = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, n, BLOCK):
        offsets = start + lanes
        mask = offsets < n
        raw, a = _magnitudes(p, offsets, mask, inv_scale, True, SCALE, STORE)
        wide = a.to(tl.float64)
        sumsq += wide * wide
        finite = a < float("inf")
        top = tl.maximum(top, tl.where(finite, a, 0.0))
        nan += (a != a).to(tl.int32)
        inf += (a == float("inf")).to(tl.int32)
        zeros += (mask & (a == 0.0)).to(tl.int32)
        flushed += (mask & (a <= 2.0**-25)).to(tl.int32)
        tiny += (mask & (a < 2.0**-14 - 2.0**-25)).to(tl.int32)
        under += ((raw < below) & (raw != 0.0)).to(tl.int32)
        bad += (mask & ((raw < float("inf")) == 0)).to(tl.int32)
    return (
        tl.sum(sumsq, 0), tl.max(top, 0), tl.sum(nan, 0), tl.sum(inf, 0), tl.sum(zeros, 0),
        tl.sum(flushed, 0), tl.sum(tiny, 0), tl.sum(under, 0), tl.sum(bad, 0),
    )  # fmt: skip


@triton.jit
def _piece(
    p, n, inv_scale, below, ROWS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """All statistics of n elements at p: fast on whole blocks, careful on the rest, careful again where fast fails."""
    whole = n - n % (ROWS * THREADS * VEC)
    sumsq, top, zeros, flushed, tiny, under, bad = _fast(
        p, whole, inv_scale, below, ROWS, THREADS, VEC, SCALE, STORE, COUNTS
    )
    # A finite sum proves that nothing was NaN or Inf. Squares below 2^-126 lose up to 2^-150 each; above
    # n 2^-126 that is less than a rounding of the sum. (top == 0 alone proves nothing: maxima drop NaN.)
    sound = (sumsq < float("inf")) & ((sumsq >= whole * 1.1754943508222875e-38) | (top == 0.0))
    nan = tl.zeros((), tl.int32)
    inf = nan
    if STORE:
        tl.debug_barrier()  # the values written above are read again below, by other threads
        if not sound:
            s, t, nan, inf, zeros, flushed, tiny, _u, _b = _careful(p, 0, whole, 1.0, 0.0, TAIL, False, False)
            sumsq = s
            top = t
        first = whole
    else:
        first = tl.where(sound, whole, 0)
        sumsq = tl.where(sound, sumsq, 0.0)
        top = tl.where(sound, top, 0.0)
        zeros = tl.where(sound, zeros, 0)
        flushed = tl.where(sound, flushed, 0)
        tiny = tl.where(sound, tiny, 0)
        under = tl.where(sound, under, 0)
    s, t, n1, i1, z1, f1, t1, u1, b1 = _careful(p, first, n, inv_scale, below, TAIL, SCALE, STORE)
    return (
        sumsq + s, tl.maximum(top, t), nan + n1, inf + i1, zeros + z1,
        flushed + f1, tiny + t1, under + u1, bad + b1,
    )  # fmt: skip


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
    inv_scale_at, below_at, inv_scale, below, max_norm, n_tensors,
    ROWS: tl.constexpr, THREADS: tl.constexpr, TAIL: tl.constexpr, JOIN: tl.constexpr,
    TENSOR_WORDS: tl.constexpr, P_FLOATS: tl.constexpr, P_INTS: tl.constexpr, WORDS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    SCALE: tl.constexpr, STORE: tl.constexpr, COUNTS: tl.constexpr,
    INV_SCALE_AT: tl.constexpr, BELOW_AT: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,). FP32, BF16, FP16: which dtypes occur in the list; code for others is not generated."""
    pid = tl.program_id(0)
    head = tl.load(pieces + pid * 2)
    start = tl.load(pieces + pid * 2 + 1)
    t = (head & 0xFFFFFFFF).to(tl.int32)
    n = (head >> 32).to(tl.int32)
    record = tensors + t * TENSOR_WORDS
    address = tl.load(record)
    numel = tl.load(record + 1)
    first_piece = tl.load(record + 2).to(tl.int32)
    n_pieces = tl.load(record + 3).to(tl.int32)
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
    if FP32:
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = _piece(
                p, n, inv_scale, below, ROWS, THREADS, 4, TAIL, SCALE, STORE, COUNTS
            )
    if BF16:
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = _piece(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS
            )
    if FP16:
        if dtype == 2:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
            sumsq, top, nan, inf, zeros, flushed, tiny, under, bad = _piece(
                p, n, inv_scale, below, ROWS // 2, THREADS, 8, TAIL, SCALE, STORE, COUNTS
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
    tl.debug_barrier()
    # acq_rel: whoever draws the last ticket sees the parts of all others. The last one also resets the counter.
    if tl.atomic_add(tickets + t, 1, sem="acq_rel") == n_pieces - 1:
        tl.store(tickets + t, 0)
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
    fp32, bf16, fp16 = map(bool, present)
    return CompileSpec(
        kernel=name,
        dtype=dtype,
        fn=lambda: stats_kernel,
        signature={**types, "inv_scale": "fp32", "below": "fp32", "max_norm": "fp32", "n_tensors": "i32"},
        constexprs={
            "ROWS": launch.ROWS, "THREADS": launch.THREADS, "TAIL": launch.TAIL, "JOIN": launch.JOIN,
            "TENSOR_WORDS": TENSOR_WORDS, "P_FLOATS": P_FLOATS, "P_INTS": P_INTS, "WORDS": WORDS,
            "FP32": fp32, "BF16": bf16, "FP16": fp16, "SCALE": scale, "STORE": store, "COUNTS": counts,
            "INV_SCALE_AT": scale, "BELOW_AT": False,
        },
        divisible=tuple(types),
        num_warps=launch.NUM_WARPS,
        streaming=True,
        shape="124M in 148 tensors",
    )  # fmt: skip
