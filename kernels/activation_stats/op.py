"""The public op: checks, the choice of implementation, and the torch operator behind it."""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from kernels.activation_stats.host import record_on_host
from kernels.activation_stats.reference import record_cells
from kernels.activation_stats.ring import RingSlots
from kernels.dispatch import operators_watched, resolve_impl
from kernels.multi_tensor_stats.op import check_tensors

_OP = "activation_stats"
COUNTS = ("all", "range")
_library = torch.library.Library("dtype_dynamics_activation", "DEF")
_library.define(
    "activation_stats(Tensor[] tensors, Tensor(a!) words, Tensor state, Tensor(b!) floats, Tensor(c!) ints, "
    "int[] slots, str counts, str impl) -> ()"
)


def activation_stats(tensors: Sequence[torch.Tensor], out_slots: RingSlots, *, counts: str = "all", impl: str = "auto") -> None:
    """Measure tensors into the cells `out_slots = ring.at([...])` of the running step, if it is measured.

    tensors  fp32, bf16, fp16, mixed; any shape (one that is not dense is copied first); fewer than 2^31 elements each;
             on the ring's device. One launch for every 8.
    counts   "all"; "range": the largest finite |x| and the counts of NaN and Inf only, for every step of a run.
             A cell that was written so, were it once in a step, reads None elsewhere

    No host sync on CUDA, safe to capture in a CUDA graph, and autograd sees nothing of it. Calls on one ring
    belong on one stream. Deterministic. TypeError for other dtypes, ValueError for another device or length.
    """
    tensors, ring = list(tensors), out_slots.ring
    if counts not in COUNTS:
        raise ValueError(f"{_OP}: counts must be one of {', '.join(COUNTS)}, got {counts!r}")
    check_tensors(_OP, tensors, ring.device)
    if len(tensors) != len(out_slots.indices):
        raise ValueError(f"{_OP}: {len(tensors)} tensors for {len(out_slots.indices)} slots")
    for index, x in enumerate(tensors):
        if x.numel() >= 2**31:
            raise ValueError(f"{_OP}: tensors[{index}] has {x.numel()} elements, the limit is 2^31 - 1")
    impl = resolve_impl(_OP, impl, ring.device)
    if impl == "torch" and ring.device.type == "cpu" and not is_compiling() and not operators_watched():
        return record_on_host(tensors, ring.words, ring.state, out_slots.indices, counts)  # an operator costs 15 us more
    floats, ints = _scratch(ring)
    torch.ops.dtype_dynamics_activation.activation_stats(
        tensors, ring.words, ring.state, floats, ints, list(out_slots.indices), counts, impl
    )


def _scratch(ring) -> tuple[torch.Tensor, ...]:
    """Room for the shares of 8 tensors, and their tickets, which are zero between launches."""
    if ring.scratch is None:
        floats = torch.zeros((8, 64, 2), dtype=torch.float64, device=ring.device)
        ring.scratch = floats, torch.zeros(8 * 64 * 8 + 8, dtype=torch.int32, device=ring.device)
    return ring.scratch


def _run(tensors, words, state, floats, ints, slots, counts, impl) -> None:
    if impl == "triton":
        from kernels.activation_stats.triton_kernel import launch_activation  # imports triton

        launch_activation(tensors, words, state, floats, ints, slots, counts)
    elif words.device.type == "cpu":
        record_on_host(tensors, words, state, slots, counts)
    else:
        record_cells(tensors, words, state, slots, counts)


@torch.library.register_fake("dtype_dynamics_activation::activation_stats", lib=_library)
def _fake(*args) -> None:
    return None


_library.impl("activation_stats", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_activation.activation_stats)
def _no_model_flops(*args, **kwargs) -> int:
    """Measuring is not the model's work: it adds nothing to model FLOPs."""
    return 0
