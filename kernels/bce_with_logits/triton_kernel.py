"""Triton kernel for BCE with logits. The maths and the traffic are in the package docstring."""

from dataclasses import dataclass

import triton
import triton.language as tl

from kernels.compile import CompileSpec
from kernels.logit_stats.triton_kernel import abs_bits, load_key, record_tile

_WARPS = 4
_REGISTERS = 96


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
def bce_tile(row_ptr, grad_ptr, targets, pos_weight, row, start, width, scale, total, seen, words,
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
        record_tile(x, bits, cols, row, width, seen, words)
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
def bce_rows(logits, grad, row_loss, targets, pos_weight, factor_ptr, words,
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
        seen = tl.max(load_key(words, THREADS), 0)
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
                tl.atomic_add(words + 5, bad, sem="relaxed")
    total = tl.zeros([BLOCK], tl.float32)
    whole = width // BLOCK * BLOCK  # columns in tiles that need no mask
    for start in range(0, whole, BLOCK):
        total = bce_tile(row_ptr, grad_ptr, target_ptr, pos_weight, row, start, width, scale, total, seen, words,
                         LOSS, GRAD, STATS, WEIGHTED, LABELS, False, BLOCK)  # fmt: skip
    if whole < width:
        total = bce_tile(row_ptr, grad_ptr, target_ptr, pos_weight, row, whole, width, scale, total, seen, words,
                         LOSS, GRAD, STATS, WEIGHTED, LABELS, True, BLOCK)  # fmt: skip
    if LOSS:
        tl.store(row_loss + row, tl.sum(total, 0) + flaw)


@dataclass(frozen=True)
class Plan:
    """How a launch was made: dense targets have labels = 0."""

    kernel: str
    grid: tuple[int, ...]
    block: int
    num_warps: int
    labels: int


def plan(rows: int, width: int, element_bytes: int, labels: int = 0) -> Plan:
    """One 128-bit load of logits a thread and tile: the arithmetic per element is long, and registers are few."""
    per_thread = 16 // element_bytes
    block = min(_WARPS * 32 * per_thread, max(32, triton.next_power_of_2(width)))
    return Plan("bce_rows", (rows,), block, max(1, block // (32 * per_thread)), labels)


def launch(logits, targets, grad, row_loss, factor, words, *, sparse, pos_weight) -> Plan:
    """Row losses and gradient, whichever buffer is not None; returns the plan.

    targets  dense (T, L), any float dtype or bool, or sparse int64 (T, K); unit column stride
    factor   of the gradient: a Python float, or an fp32 device scalar
    """
    rows, width = logits.shape
    labels = targets.shape[1] if sparse else 0
    p = plan(rows, width, logits.element_size(), labels)
    pointer, number = (None, factor) if isinstance(factor, float) else (factor, 1.0)
    bce_rows[p.grid](
        logits, grad, row_loss, targets, pos_weight, pointer, words,
        logits.stride(0), 0 if grad is None else grad.stride(0), targets.stride(0), width, number,
        LOSS=row_loss is not None, GRAD=grad is not None, STATS=words is not None, WEIGHTED=pos_weight is not None,
        HAS_FACTOR=pointer is not None, LABELS=labels, LABELS_BLOCK=triton.next_power_of_2(max(1, labels)),
        BLOCK=p.block, THREADS=32 * p.num_warps, num_warps=p.num_warps, maxnreg=_REGISTERS,
    )  # fmt: skip
    return p


def compile_specs() -> list[CompileSpec]:
    specs = []
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        dense, sparse = (plan(8192, 4272, size, labels) for labels in (0, 8))
        specs += [
            _spec("bce_rows_dense", dtype, dense),
            _spec("bce_rows_sparse", dtype, sparse),
            _spec("bce_rows_weighted", dtype, dense, WEIGHTED=True),
            _spec("bce_rows_gradient", dtype, sparse, LOSS=False, STATS=False, row_loss=None, words=None),
        ]
    return specs


def _spec(kernel, dtype, p, **changed) -> CompileSpec:
    """A pointer changed to None is a branch compiled away."""
    return CompileSpec(
        kernel=kernel,
        dtype=dtype,
        fn=lambda: bce_rows,
        signature={
            "logits": f"*{dtype}",
            "grad": f"*{dtype}",
            "row_loss": "*fp32",
            "targets": "*i64" if p.labels else f"*{dtype}",
            "pos_weight": "*fp32",
            "factor_ptr": "*fp32",
            "words": "*i64",
            "stride": "i32",
            "grad_stride": "i32",
            "target_stride": "i32",
            "width": "i32",
            "factor": "fp32",
        },
        constexprs={
            "LOSS": True,
            "GRAD": True,
            "STATS": True,
            "WEIGHTED": False,
            "HAS_FACTOR": False,
            "LABELS": p.labels,
            "LABELS_BLOCK": max(1, p.labels),
            "BLOCK": p.block,
            "THREADS": 32 * p.num_warps,
            **changed,
        },
        divisible=(
            "logits",
            "grad",
            "row_loss",
            "targets",
            "pos_weight",
            "factor_ptr",
            "words",
            "stride",
            "grad_stride",
            "target_stride",
            "width",
        ),
        num_warps=p.num_warps,
        streaming=True,
        shape="8192x4272",
        maxnreg=_REGISTERS,
    )
