"""The kernel: one program per piece of multi_tensor_stats' tables."""

import triton
import triton.language as tl

from kernels.multi_tensor_stats.piece import rounded, widened


@triton.jit
def _scale_piece(p, n, factor, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """n elements at p: whole blocks in 16-byte loads and stores, then the end under a mask."""
    lanes = tl.arange(0, BLOCK)
    whole = n - n % BLOCK
    for start in range(0, whole, BLOCK):
        block = p + tl.multiple_of(start, BLOCK)
        x = tl.load(block + lanes)
        tl.store(block + lanes, rounded(widened(x) * factor, x))
    ends = tl.arange(0, TAIL)
    for start in range(whole, n, TAIL):
        mask = start + ends < n
        x = tl.load(p + start + ends, mask=mask)
        tl.store(p + start + ends, rounded(widened(x) * factor, x), mask=mask)


@triton.jit
def scale_kernel(
    tensors, pieces, factor_at, n_pieces,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, TENSOR_WORDS: tl.constexpr,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,), last piece first: whatever measured the list just now left its end in the L2 cache."""
    piece = n_pieces - 1 - tl.program_id(0)
    head = tl.load(pieces + piece * 2)
    start = tl.load(pieces + piece * 2 + 1)
    n = (head >> 32).to(tl.int32)
    record = tensors + (head & 0xFFFFFFFF) * TENSOR_WORDS
    address = tl.load(record)
    dtype = tl.load(record + 4)
    factor = tl.load(factor_at)
    if FP32:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 0:
            p = tl.multiple_of((address + start * 4).to(tl.pointer_type(tl.float32)), 16)
            _scale_piece(p, n, factor, BLOCK, TAIL)
    if BF16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 1:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.bfloat16)), 16)
            _scale_piece(p, n, factor, BLOCK, TAIL)
    if FP16:  # noqa: SIM102 (one known at compile time, one at run time)
        if dtype == 2:
            p = tl.multiple_of((address + start * 2).to(tl.pointer_type(tl.float16)), 16)
            _scale_piece(p, n, factor, BLOCK, TAIL)


def compile_specs():
    """Each dtype alone, and a list that mixes all."""
    from kernels.compile import CompileSpec
    from kernels.multi_tensor_stats.triton_kernel import TENSOR_WORDS
    from kernels.scale import launch

    mixes = {"fp32": (1, 0, 0), "bf16": (0, 1, 0), "fp16": (0, 0, 1), "mixed": (1, 1, 1)}
    return [
        CompileSpec(
            kernel="scale",
            dtype=dtype,
            fn=lambda: scale_kernel,
            signature={"tensors": "*i64", "pieces": "*i64", "factor_at": "*fp32", "n_pieces": "i32"},
            constexprs={
                "BLOCK": launch.BLOCK, "TAIL": launch.TAIL, "TENSOR_WORDS": TENSOR_WORDS,
                **dict(zip(("FP32", "BF16", "FP16"), map(bool, present), strict=True)),
            },
            divisible=("tensors", "pieces"),
            num_warps=launch.NUM_WARPS,
            streaming=True,
            shape="124M in 148 tensors",
        )
        for dtype, present in mixes.items()
    ]  # fmt: skip
