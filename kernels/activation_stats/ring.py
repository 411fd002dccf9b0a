"""The ring buffer: cells of 12 words for (measured step, slot), its device-side state, and its readings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Words of a cell; SUMSQ and ABSMAX are float64 bits. STEP is 0 in a cell that nobody wrote.
# RANGE_ONLY is 1 where some write left out the counts: then they are missing from the cell as a whole.
SUMSQ, ABSMAX, NAN, INF, ZEROS, FP16_FLUSH, FP16_SUBNORMAL, OVER_FP16, NUMEL, STEP, RANGE_ONLY = range(11)
WORDS = 12
FP16_MAX = 65504.0
# Words of the state.
ENABLED, NOW, RECORD, EVERY = range(4)


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
    every   measure steps 1, 1 + every, 1 + 2 every, ... (0: never, until `enable`)

    `tick()` starts a step; it is device work only and may be captured. Nothing is measured before the first tick.
    """

    def __init__(self, slots: int, steps: int = 64, device: torch.device | str = "cpu", every: int = 1):
        if slots < 1 or steps < 1 or every < 0:
            raise ValueError(f"ActivationRing: slots and steps must be positive, every not negative: {slots, steps, every}")
        self.slots, self.steps = slots, steps
        self.words = torch.zeros((steps, slots, WORDS), dtype=torch.int64, device=device)
        self.device = self.words.device
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

    def set_every(self, every: int) -> None:
        """Measure every so many steps from now on (0: none). A device write, no sync; do not capture it."""
        self.state[EVERY : EVERY + 1].fill_(every)

    def read(self) -> list[ActivationReading]:
        """All cells that were written, by step and slot. Waits for the device."""
        return decode(self.words.cpu())

    def read_async(self) -> Callable[[], list[ActivationReading]]:
        """Start copying the ring to the host; call the result, on any thread, for what `read` would have given now."""
        if self.device.type != "cuda":
            words = self.words.clone()
            return lambda: decode(words)
        words = torch.empty(self.words.shape, dtype=torch.int64, pin_memory=True)
        words.copy_(self.words, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[ActivationReading]:
            copied.synchronize()
            return decode(words)

        return wait


def decode(words: torch.Tensor) -> list[ActivationReading]:
    """Readings from (steps, slots, 12) int64 on the CPU, in order of step and slot."""
    readings = []
    floats = words.view(torch.float64)
    for row, slot in (words[..., STEP] > 0).nonzero().tolist():
        w, (sumsq, absmax) = words[row, slot].tolist(), floats[row, slot, : ABSMAX + 1].tolist()
        rms = (sumsq / w[NUMEL]) ** 0.5 if w[NUMEL] else 0.0
        rms, counts = (None, [None] * 4) if w[RANGE_ONLY] else (rms, w[ZEROS : OVER_FP16 + 1])
        readings.append(ActivationReading(w[STEP], slot, w[NUMEL], absmax, rms, w[NAN], w[INF], *counts))
    return sorted(readings, key=lambda r: (r.step, r.slot))
