"""Statistics of module outputs and their gradients, into a ring buffer on the device, without a sync.

For each tensor, into one cell (step, slot) of the ring:

    numel, nan, inf, zeros, fp16_flush, fp16_subnormal, sumsq, absmax     as in multi_tensor_stats
    over_fp16    finite |x| > 65,504: what fp16 would turn into infinity (or round down to its largest value)

One launch serves up to 8 tensors. Addresses travel as kernel arguments, not in a table: an activation lives
elsewhere every step, and a CUDA graph records arguments but would re-read a table that is gone.

The ring's state (enabled, step, record) lives on the device and is advanced by `ring.tick()`, so a captured
graph decides by itself, replay after replay, which steps are measured: on an off step every program reads one
flag and returns; nothing is written. A cell written twice in one step (micro-batches) adds up.

Memory traffic of an on step: every tensor read once. Each tensor is cut into at most 64 shares; the program that
finishes a tensor last joins its shares in their order, so the same values give the same bits.

Over_fp16 costs nothing: the kernel of multi_tensor_stats counts 0 < |x| < t anyway, here with t just above 65,504,
and over_fp16 is what remains of numel.

Tried and lost: keeping references to all outputs and measuring them in one launch at the end of the step (holds
every activation alive through backward); a table of addresses (an upload per module, wrong under graph replay).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.compiler import is_compiling

from kernels.activation_stats.reference import (
    ABSMAX,
    COLUMNS,
    INF,
    NAN,
    NUMEL,
    OVER_FP16,
    RANGE_ONLY,
    SHARES,
    STEP,
    TENSORS,
    ZEROS,
    record_cells,
    record_on_cpu,
)
from kernels.dispatch import operators_watched, register, resolve_impl
from kernels.multi_tensor_stats import bytes_moved as bytes_moved
from kernels.multi_tensor_stats import flops as flops
from kernels.tensor_list import TILE_FLOATS, TILE_INTS, check_tensors

_OP = "activation_stats"
COUNTS = ("all", "range")
ENABLED, NOW, RECORD, EVERY = range(4)  # of a ring's state
_library = torch.library.Library("dtype_dynamics_activation", "DEF")


@dataclass(frozen=True)
class ActivationReading:
    """Plain numbers of one cell. `rms` includes NaN and Inf, as an eager one would; `absmax` is over finite values.

    None: not measured, because the cell was written with counts="range".
    """

    step: int
    slot: int
    numel: int
    absmax: float
    rms: float | None
    nan: int
    inf: int
    zeros: int | None
    fp16_flush: int | None
    fp16_subnormal: int | None
    over_fp16: int | None


@dataclass(frozen=True)
class RingSlots:
    """The cells that one call writes: `out_slots` of activation_stats."""

    ring: "ActivationRing"
    indices: tuple[int, ...]


class ActivationRing:
    """A ring of `steps` measured steps times `slots` cells on `device`.

    slots   cells per step, one for each tensor that is watched
    steps   how many measured steps are kept; older ones are overwritten
    every   measure steps 1, 1 + every, 1 + 2 every, ... (0: never)

    `tick()` starts a step; it is device work only and may be captured. Nothing is measured before the first tick.
    """

    def __init__(self, slots: int, steps: int = 64, device: torch.device | str = "cpu", every: int = 1):
        if slots < 1 or steps < 1 or every < 0:
            raise ValueError(f"ActivationRing: slots and steps must be positive, every not negative: {slots, steps, every}")
        self.slots, self.steps = slots, steps
        self.cells = torch.zeros((steps, slots, COLUMNS), dtype=torch.int64, device=device)
        self.device = self.cells.device
        self.state = torch.tensor([0, 0, -1, every], dtype=torch.int64).to(device)
        self.scratch: tuple[torch.Tensor, ...] | None = None  # of the launcher

    def at(self, indices: Sequence[int] | int) -> RingSlots:
        """The slots `indices` of whatever step is running, for `activation_stats(tensors, ring.at(...))`."""
        indices = (indices,) if isinstance(indices, int) else tuple(indices)
        for i in indices:
            if not 0 <= i < self.slots:
                raise IndexError(f"ActivationRing: slot {i} of {self.slots}")
        if len(set(indices)) != len(indices):
            raise ValueError(f"ActivationRing: a slot twice in one call: {indices}")
        return RingSlots(self, indices)

    def tick(self) -> None:
        """Start the next step: on the device decide whether it is measured, and into which row."""
        now, every = self.state[NOW : NOW + 1], self.state[EVERY : EVERY + 1]
        enabled, record = self.state[ENABLED : ENABLED + 1], self.state[RECORD : RECORD + 1]
        now.add_(1)
        enabled.copy_(((now - 1) % every.clamp(min=1) == 0) & (every > 0))
        record.add_(enabled)

    def read(self) -> list[ActivationReading]:
        """All cells that were written, by step and slot. Waits for the device."""
        return decode(self.cells.cpu())


def decode(cells: torch.Tensor) -> list[ActivationReading]:
    """Readings from (steps, slots, 12) int64 on the CPU, in order of step and slot."""
    readings = []
    floats = cells.view(torch.float64)
    for row, slot in (cells[..., STEP] > 0).nonzero().tolist():
        cell, (sumsq, absmax) = cells[row, slot].tolist(), floats[row, slot, : ABSMAX + 1].tolist()
        rms = (sumsq / cell[NUMEL]) ** 0.5 if cell[NUMEL] else 0.0
        rms, counts = (None, [None] * 4) if cell[RANGE_ONLY] else (rms, cell[ZEROS : OVER_FP16 + 1])
        readings.append(ActivationReading(cell[STEP], slot, cell[NUMEL], absmax, rms, cell[NAN], cell[INF], *counts))
    return sorted(readings, key=lambda r: (r.step, r.slot))


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
        return record_on_cpu(tensors, ring.cells, ring.state, out_slots.indices, counts)  # an operator costs 15 us more
    floats, ints = _scratch(ring)
    _record(tensors, ring.cells, ring.state, floats, ints, list(out_slots.indices), counts, impl)


def _scratch(ring: "ActivationRing") -> tuple[torch.Tensor, ...]:
    """Room for the shares of the tensors of one launch, and their tickets, which are zero between launches."""
    if ring.scratch is None:
        floats = torch.zeros((TENSORS, SHARES, TILE_FLOATS), dtype=torch.float64, device=ring.device)
        ints = torch.zeros(TENSORS * SHARES * TILE_INTS + TENSORS, dtype=torch.int32, device=ring.device)
        ring.scratch = floats, ints
    return ring.scratch


def _run(tensors, cells, state, floats, ints, slots, counts, impl) -> None:
    if impl == "triton":
        from kernels.activation_stats.triton_kernel import launch_activation  # imports triton

        launch_activation(tensors, cells, state, floats, ints, slots, counts)
    elif cells.device.type == "cpu":
        record_on_cpu(tensors, cells, state, slots, counts)
    else:
        record_cells(tensors, cells, state, slots, counts)


_record = register(
    _library,
    "activation_stats(Tensor[] tensors, Tensor(a!) cells, Tensor state, Tensor(b!) floats, Tensor(c!) ints, "
    "int[] slots, str counts, str impl) -> ()",
    _run,
)
