"""The second pass of clip=True. The first, and the only one of clip=False, is multi_tensor_stats' kernel."""

import triton
import triton.language as tl

from kernels.multi_tensor_stats.piece import rounded, widened


@triton.jit
def _clip_piece(p, n, inv_scale, factor, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """round(round(x inv_scale) factor): the two roundings of unscale and clip."""
    lanes = tl.arange(0, BLOCK)
    whole = n - n % BLOCK
    for start in range(0, whole, BLOCK):
        block = p + tl.multiple_of(start, BLOCK)
        x = tl.load(block + lanes)
        y = rounded(widened(x) * inv_scale, x)
        tl.store(block + lanes, rounded(widened(y) * factor, x))
    ends = tl.arange(0, TAIL)
    for start in range(whole, n, TAIL):
        mask = start + ends < n
        x = tl.load(p + start + ends, mask=mask)
        y = rounded(widened(x) * inv_scale, x)
        tl.store(p + start + ends, rounded(widened(y) * factor, x), mask=mask)


@triton.jit
def clip_kernel(
    tensors, pieces, inv_scale_at, factor_at, inv_scale, n_pieces,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, TENSOR_WORDS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, INV_SCALE_AT: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,), last piece first: its values are the ones still in the L2 cache."""
    piece = n_pieces - 1 - tl.program_id(0)
    head = tl.load(pieces + piece * 2)
    start = tl.load(pieces + piece * 2 + 1)
    n = (head >> 32).to(tl.int32)
    record = tensors + (head & 0xFFFFFFFF) * TENSOR_WORDS
    address = tl.load(record)
    dtype = tl.load(record + 4)
    factor = tl.load(factor_at)
    if INV_SCALE_AT:
        inv_scale = tl.load(inv_scale_at)
    if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            _clip_piece(p, n, inv_scale, factor, BLOCK, TAIL)
    if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            _clip_piece(p, n, inv_scale, factor, BLOCK, TAIL)


def compile_specs():
    """The pass that unscales in place, the one that only measures what unscaling would give, and the clip."""
    from kernels.compile import CompileSpec
    from kernels.multi_tensor_stats.triton_kernel import TENSOR_WORDS, stats_spec
    from kernels.unscale import launch

    specs = []
    for dtype, present in {"fp32": (1, 0, 0), "bf16": (0, 1, 0), "mixed": (1, 1, 0)}.items():
        specs.append(stats_spec("unscale_in_place", dtype, present, scale=True, store=True))
        specs.append(stats_spec("unscale_measure", dtype, present, scale=True))
        specs.append(
            CompileSpec(
                kernel="unscale_clip",
                dtype=dtype,
                fn=lambda: clip_kernel,
                signature={
                    "tensors": "*i64", "pieces": "*i64", "inv_scale_at": "*fp32", "factor_at": "*fp32",
                    "inv_scale": "fp32", "n_pieces": "i32",
                },
                constexprs={
                    "BLOCK": launch.BLOCK, "TAIL": launch.TAIL, "TENSOR_WORDS": TENSOR_WORDS,
                    "FP32": bool(present[0]), "BF16": bool(present[1]), "INV_SCALE_AT": True,
                },
                divisible=("tensors", "pieces", "inv_scale_at"),
                num_warps=launch.NUM_WARPS,
                streaming=True,
                shape="124M in 148 tensors",
            )
        )  # fmt: skip
    return specs
