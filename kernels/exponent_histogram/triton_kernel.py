"""The kernel and its launcher: persistent programs, a histogram each, added to the result at the end."""

import torch
import triton
import triton.language as tl

from kernels.exponent_histogram import counts as c
from kernels.multi_tensor_stats.op import flat
from kernels.multi_tensor_stats.piece import widened

BLOCK, NUM_WARPS, PROGRAMS_PER_SM = 4096, 4, 4


@triton.jit
def _codes(x, FIRST: tl.constexpr, ABOVE: tl.constexpr):
    """The word that counts each element."""
    bits = widened(x).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.minimum(tl.maximum((magnitude >> 23) - (127 - 40) + FIRST, FIRST - 1), ABOVE)
    code = tl.where(magnitude == 0, 0, code)
    infinite = tl.where(bits < 0, ABOVE + 3, ABOVE + 2)
    special = tl.where(magnitude > 0x7F800000, ABOVE + 1, infinite)
    return tl.where(magnitude >= 0x7F800000, special, code)


@triton.jit
def histogram_kernel(x_ptr, words, n, BLOCK: tl.constexpr, WORDS: tl.constexpr, FIRST: tl.constexpr, ABOVE: tl.constexpr):
    """Grid (programs,): blocks pid, pid + programs, ...; the last, partial block goes to the program whose turn it is."""
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros((WORDS,), tl.int32)
    whole = n - n % BLOCK
    for start in range(pid * BLOCK, whole, tl.num_programs(0) * BLOCK):
        x = tl.load(x_ptr + tl.multiple_of(start, BLOCK) + lanes)
        counts += tl.histogram(_codes(x, FIRST, ABOVE), WORDS)
    if (whole < n) & (whole // BLOCK % tl.num_programs(0) == pid):
        mask = whole + lanes < n
        codes = _codes(tl.load(x_ptr + whole + lanes, mask=mask, other=0.0), FIRST, ABOVE)
        counts += tl.histogram(tl.where(mask, codes, WORDS - 1), WORDS)  # the last word is nobody's
    words_at = tl.arange(0, WORDS)
    tl.atomic_add(words + words_at, counts.to(tl.int64), mask=(counts > 0) & (words_at < WORDS - 1), sem="relaxed")


def launch_histogram(x: torch.Tensor, words: torch.Tensor) -> int:
    """Start the kernel; returns the number of programs (0: x is empty and nothing ran)."""
    if x.numel() == 0:
        return 0
    x = flat(x)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(triton.cdiv(x.numel(), BLOCK), processors * PROGRAMS_PER_SM)
    with torch.cuda.device_of(x):
        histogram_kernel[(programs,)](
            x, words, x.numel(), BLOCK=BLOCK, WORDS=c.WORDS, FIRST=c.FIRST_BIN, ABOVE=c.ABOVE_RANGE, num_warps=NUM_WARPS
        )
    return programs


def compile_specs():
    """One per dtype, 8,192 rows of 768."""
    from kernels.compile import CompileSpec

    return [
        CompileSpec(
            kernel="exponent_histogram",
            dtype=dtype,
            fn=lambda: histogram_kernel,
            signature={"x_ptr": f"*{dtype}", "words": "*i64", "n": "i32"},
            constexprs={"BLOCK": BLOCK, "WORDS": c.WORDS, "FIRST": c.FIRST_BIN, "ABOVE": c.ABOVE_RANGE},
            divisible=("x_ptr", "words", "n"),
            num_warps=NUM_WARPS,
            streaming=True,
            shape="8192x768",
        )
        for dtype in ("fp32", "bf16", "fp16")
    ]
