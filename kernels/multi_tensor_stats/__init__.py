"""Statistics of a whole list of tensors (gradients, parameters, optimizer states) in one pass and one launch.

For each tensor x, and for all of them together:

    sumsq  sum of x_i^2            norm  sqrt(sumsq)          absmax  max |x_i| over finite x_i
    nan, inf                       counts of NaN and of +-Inf
    zeros                          x_i == 0
    fp16_flush                     0 < |x_i| <= 2^-25: fp16 rounds it to 0 (the tie goes to even)
    fp16_subnormal                 2^-25 < |x_i| < 2^-14 - 2^-25: fp16 keeps fewer than 11 bits of it
    below                          0 < |x_i| < t, t = 2^-24 or the caller's
    first_nonfinite_index          of the first tensor of the list with a NaN or an Inf

Memory traffic: every element read once (n x element size), plus 112 bytes of table and partial results for each
tile of 16K elements: 0.2 % of fp32. Arithmetic, counted in sm_90 machine code: 11 instructions an element in fp32,
8 in bf16 and fp16 (tile_stats.py; the plain loop took 15), 3 to 5 without counts. At 4.8 TB/s an H200 has 24 issue
slots for an fp32 element and 12 for a 16-bit one.

How one read suffices. The sum of squares runs in fp32 within a tile; a finite sum proves that the tile holds
no NaN and no Inf, so the fast loop counts neither. Where the sum is not finite, or so small that squares may have
been lost below 2^-126, the tile is read again and done in float64 with every count. That decision is taken on
the device. Tiles are joined in float64 in their order, by whichever program finishes a tensor last (a ticket
counter per tensor, then one for the list): one launch, and the same bits every time.

No GPU has run these kernels yet: they are tested under Triton's interpreter and compiled for every generation
(but for the two PTX instructions of tile_stats.py, which the interpreter spells out). GPU times: unmeasured.

Tried and lost: accumulators as wide as a 16-byte load (168 registers in bf16; folding within the thread first takes
72); integer thresholds in 16-bit halves of a word (6 instructions an element and threshold pair, all on the slower
integer pipe); float atomics (order varies, and every call would have to clear the result first); on the CPU
`vector_norm(inf)`, `isfinite` and boolean sums (cpu.py), and BLAS dots over a whole chunk (1e-5 off in bf16, whose
coarse values round one way; dots of 1,024 are 1e-8 off).
"""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling

from kernels.dispatch import check_device_scalar, check_same_device, number_or_tensor, operators_watched, register, resolve_impl
from kernels.multi_tensor_stats.cpu import cpu_stats
from kernels.multi_tensor_stats.reference import UNDERFLOW_BELOW, TensorStats, reference_stats
from kernels.tensor_list import check_tensors, flats_of

_OP = "multi_tensor_stats"
COUNTS = ("all", "underflow", "none")
_library = torch.library.Library("dtype_dynamics_stats", "DEF")


def bytes_moved(numels: list[int], element_bytes: list[int]) -> int:
    """Device-memory bytes of one call, of activation_stats too where its ring is on: every element read once (tables and
    partial sums left out: 0.15 %)."""
    return sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int]) -> int:
    """Floating-point operations: a multiply and an add for each element; comparisons are not counted."""
    return 2 * sum(numels)


def multi_tensor_stats(
    tensors: Sequence[torch.Tensor],
    *,
    out: TensorStats | None = None,
    underflow_below: float | torch.Tensor = UNDERFLOW_BELOW,
    counts: str = "all",
    impl: str = "auto",
) -> TensorStats:
    """Per-tensor and total statistics of a list; no host sync on CUDA, one launch.

    tensors          fp32, bf16, fp16, mixed; any shapes, empty and non-contiguous too (one that is not
                     dense is copied first); one device. An empty list gives zeros.
    out              result to overwrite, of the same length and device; default: a new one
    underflow_below  `below` counts 0 < |x| < this; a number, or a one-element float32 tensor on the device
                     (after unscaling: 2^-24 / scale)
    counts           "all"; "underflow": zeros and below only, where the others cost (on a CPU); "none": a mere
                     check that everything is finite. Cells left out hold -1, and `read()` gives None
    impl             "auto": Triton on CUDA, the numpy and torch path of cpu.py elsewhere;
                     "torch" on CUDA is the float64 definition, slow

    Raises TypeError for other dtypes or sparse tensors, ValueError for mixed devices or an `out` that does
    not fit, RuntimeError when a CUDA graph is being captured and this list has not been seen before.
    Deterministic: the same values in the same list give the same bits.
    """
    if counts not in COUNTS:
        raise ValueError(f"{_OP}: counts must be one of {COUNTS}, got {counts!r}")
    tensors = list(tensors)
    device = list_device(tensors, out)
    check_tensors(_OP, tensors, device)
    out = fitting_out(_OP, out, len(tensors), device)
    check_device_scalar(_OP, "underflow_below", underflow_below, device)
    impl = resolve_impl(_OP, impl, device)
    if impl == "torch" and device.type == "cpu" and not is_compiling() and not operators_watched():
        cpu_stats(flats_of(tensors), out, float(underflow_below), counts=counts)  # a registered operator costs 20 us more
        return out
    _stats_into(tensors, out.table, *number_or_tensor(underflow_below), counts, impl)
    return out


def list_device(tensors: list[torch.Tensor], out: TensorStats | None) -> torch.device:
    """Of the first tensor; of the result, or the CPU, where the list is empty."""
    if tensors:
        return tensors[0].device
    return out.table.device if out is not None else torch.device("cpu")


def fitting_out(op: str, out: TensorStats | None, n_tensors: int, device: torch.device) -> TensorStats:
    """`out`, checked, or a new result."""
    if out is None:
        return TensorStats.allocate(n_tensors, device)
    if len(out) != n_tensors:
        raise ValueError(f"{op}: out holds {len(out)} tensors, the list {n_tensors}")
    check_same_device(op, device, out=out.table)
    return out


def _run(tensors, table, below_at, below, counts, impl) -> None:
    if impl == "triton":
        from kernels.multi_tensor_stats.triton_kernel import launch_stats  # imports triton

        launch_stats(tensors, table, below_at, below, counts != "none")
    elif table.device.type == "cpu":
        below = below if below_at is None else below_at.item()
        cpu_stats(flats_of(tensors), TensorStats(table), below, counts=counts)
    else:
        reference_stats(tensors, TensorStats(table), below if below_at is None else below_at, counts=counts != "none")


_stats_into = register(
    _library,
    "multi_tensor_stats(Tensor[] tensors, Tensor(a!) table, Tensor? below_at, float below, str counts, str impl) -> ()",
    _run,
)
