"""Triton kernel for BCE with logits. The maths and the traffic are in the package docstring."""

import torch
import triton
import triton.language as tl

from kernels.compile import CompileSpec, as_launched
from kernels.dispatch import DTYPES, number_or_tensor
from kernels.logit_stats.triton_kernel import Tiling, abs_bits, counters_on_meta, load_key, on_meta, record_tile

_WARPS = 4


@triton.jit
def log1p_unit(u):
    """log1p(u) for u in [0, 1] to 1.5e-7 relative: a degree-9 Chebyshev fit of log1p(u)/u.

    A logarithm of 1 + u would lose the small u, of which a healthy multi-label loss is made.
    """
    p = u * -0.0031760570127516985 + 0.019542526453733444
    p = p * u - 0.056373611092567444
    p = p * u + 0.10543623566627502
    p = p * u - 0.1526966691017151
    p = p * u + 0.1966327428817749
    p = p * u - 0.24951615929603577
    p = p * u + 0.33329710364341736
    p = p * u - 0.49999892711639404
    return u * (p * u + 1.0)


@triton.jit
def target_tile(targets, cols, start, width, LABELS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Targets of one tile as fp32. LABELS > 0: from a list of that many indices, most of them in other tiles."""
    if LABELS:
        y = tl.zeros([BLOCK], tl.float32)
        for k in range(LABELS):
            label = tl.load(targets + k)
            if (label >= start) & (label < start + BLOCK):
                y = tl.where(cols == label, 1.0, y)
    elif MASKED:
        y = tl.load(targets + cols, mask=cols < width, other=0.0).to(tl.float32)
    else:
        y = tl.load(targets + cols).to(tl.float32)
    return y


@triton.jit
def bce_tile(row_ptr, grad_ptr, targets, pos_weight, row, start, width, scale, total, seen, counters,
             LOSS: tl.constexpr, GRAD: tl.constexpr, STATS: tl.constexpr, WEIGHTED: tl.constexpr,
             LABELS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add one tile to the row's loss and to the statistics, and write its gradient."""
    cols = start + tl.arange(0, BLOCK)
    inside = cols < width
    if MASKED:
        x = tl.load(row_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(row_ptr + cols, eviction_policy="evict_first").to(tl.float32)
    y = target_tile(targets, cols, start, width, LABELS, MASKED, BLOCK)
    no = 1.0 - y
    wy = y
    if WEIGHTED:
        wy = y * tl.load(pos_weight + cols, mask=inside, other=0.0)
    if STATS:
        bits = abs_bits(x)
        if MASKED:
            bits = tl.where(inside, bits, -1)
        record_tile(x, bits, cols, row, width, seen, counters)
    size = tl.abs(x)
    u = tl.exp(-size)
    if LOSS:
        wrong = tl.where(x > 0, no, wy)
        loss = tl.where(wrong == 0.0, 0.0, size * wrong) + log1p_unit(u) * (no + wy)
        if MASKED:
            loss = tl.where(inside, loss, 0.0)
        total += loss
    if GRAD:
        likely = 1.0 / (1.0 + u)
        unlikely = u * likely
        g = scale * tl.where(x > 0, no * likely - wy * unlikely, no * unlikely - wy * likely)
        g = g.to(grad_ptr.dtype.element_ty)
        if MASKED:
            tl.store(grad_ptr + cols, g, mask=inside, eviction_policy="evict_first")
        else:
            tl.store(grad_ptr + cols, g, eviction_policy="evict_first")
    return total


@triton.jit
def bce_rows(logits, grad, row_loss, targets, pos_weight, factor_ptr, counters,
             stride, grad_stride, target_stride, width, factor,
             LOSS: tl.constexpr, GRAD: tl.constexpr, STATS: tl.constexpr, WEIGHTED: tl.constexpr,
             HAS_FACTOR: tl.constexpr, LABELS: tl.constexpr, LABELS_BLOCK: tl.constexpr,
             BLOCK: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """One row: loss (LOSS), statistics (STATS), and the gradient times the factor (GRAD; grad may be logits)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * stride
    grad_ptr = grad
    if GRAD:
        grad_ptr = grad + row * grad_stride
    target_ptr = targets + row * target_stride
    seen = 0
    if STATS:
        seen = tl.max(load_key(counters, THREADS), 0)
    scale = factor
    if HAS_FACTOR:
        scale *= tl.load(factor_ptr).to(tl.float32)
    flaw = 0.0
    if LABELS:
        k = tl.arange(0, LABELS_BLOCK)
        labels = tl.load(target_ptr + k, mask=k < LABELS, other=-1)
        bad = tl.sum(((labels < -1) | (labels >= width)).to(tl.int64), 0)
        flaw = tl.where(bad > 0, float("nan"), 0.0)  # a label out of range makes its row NaN: loud, and no sync
        scale += flaw
        if STATS:  # noqa: SIM102 (a constant decides at compile time, a value at run time)
            if bad > 0:
                tl.atomic_add(counters + 5, bad, sem="relaxed")
    total = tl.zeros([BLOCK], tl.float32)
    whole = width // BLOCK * BLOCK  # columns in tiles that need no mask
    for start in range(0, whole, BLOCK):
        total = bce_tile(row_ptr, grad_ptr, target_ptr, pos_weight, row, start, width, scale, total, seen, counters,
                         LOSS, GRAD, STATS, WEIGHTED, LABELS, False, BLOCK)  # fmt: skip
    if whole < width:
        total = bce_tile(row_ptr, grad_ptr, target_ptr, pos_weight, row, whole, width, scale, total, seen, counters,
                         LOSS, GRAD, STATS, WEIGHTED, LABELS, True, BLOCK)  # fmt: skip
    if LOSS:
        tl.store(row_loss + row, tl.sum(total, 0) + flaw)


def tiling_of(width: int, element_bytes: int) -> Tiling:
    """One 128-bit load of logits a thread and tile: the arithmetic per element is long, and registers are few."""
    per_thread = 16 // element_bytes
    block = min(_WARPS * 32 * per_thread, max(32, triton.next_power_of_2(width)))
    return Tiling(block, max(1, block // (32 * per_thread)), registers=96)


def launch(logits, targets, grad, row_loss, factor, counters, *, sparse, pos_weight) -> None:
    """Row losses and gradient, whichever buffer is not None.

    targets  dense (T, L), any float dtype or bool, or sparse int64 (T, K); unit column stride
    factor   of the gradient: a Python float, or an fp32 device scalar
    """
    rows, width = logits.shape
    labels = targets.shape[1] if sparse else 0
    factor_at, number = number_or_tensor(factor)
    bce_rows[(rows,)](
        logits, grad, row_loss, targets, pos_weight, factor_at, counters,
        logits.stride(0), 0 if grad is None else grad.stride(0), targets.stride(0), width, number,
        LOSS=row_loss is not None, GRAD=grad is not None, STATS=counters is not None, WEIGHTED=pos_weight is not None,
        HAS_FACTOR=factor_at is not None, LABELS=labels, LABELS_BLOCK=triton.next_power_of_2(max(1, labels)),
        **tiling_of(width, logits.element_size()).constants,
    )  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """8,192 documents of 4,272 labels, padded; 8 labels a document where the targets are sparse."""
    rows, width, specs = 8192, 4272, []
    losses, weight = torch.empty(rows, device="meta"), torch.empty(width, device="meta")
    for name, dtype in DTYPES.items():
        dense, sparse = on_meta(rows, width, dtype), on_meta(rows, 8, torch.int64)
        for kernel, targets, loss, counters, pos_weight in (
            ("bce_rows_dense", dense, losses, counters_on_meta(), None),
            ("bce_rows_sparse", sparse, losses, counters_on_meta(), None),
            ("bce_rows_weighted", dense, losses, counters_on_meta(), weight),
            ("bce_rows_gradient", sparse, None, None, None),
        ):
            specs += as_launched(
                [(kernel, name, f"{rows}x{width}")], launch, dense, targets, dense, loss, 1.0 / rows, counters,
                sparse=targets is sparse, pos_weight=pos_weight,
            )  # fmt: skip
    return specs
