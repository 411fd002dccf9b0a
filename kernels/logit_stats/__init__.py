"""Logit magnitude and overflow counts, accumulated on the device and never synchronised.

What is counted, over the finite and non-finite elements of a (rows, width) matrix:

    absmax, row, col   largest finite |x| and where it is (ties: smallest row, then smallest column)
    nan, pos_inf, neg_inf
    over_fp16          finite elements with |x| > 65,504, which fp16 would turn into infinity

How it is made cheap. |x| orders like the integer made of its fp32 bits without the
sign, and in that order finite < Inf < NaN. So one integer maximum per element (and no
NaN trap: `tl.maximum` on floats drops NaN) tells per row whether *anything* unusual is
there. Only rows whose maximum is beyond 65,504 are counted element by element, and only
rows that beat the accumulator so far are searched for the column. The accumulator is
one 64-bit integer, |x| bits above, complement of the flat index below, raised with
`atomic_max`; the counts are integer atomics. All of it is exact and independent of order.

Memory traffic of the standalone pass: x read once. Inside a loss kernel: nothing.
"""

import struct

import torch

from kernels.dispatch import check_float, register, resolve_impl
from kernels.logit_stats import reference
from kernels.logit_stats.reference import BAD_TARGETS, COUNTERS, KEY, NAN, NEG_INF, OVER_FP16, POS_INF

MAX_ELEMENTS = 2**32 - 1
_library = torch.library.Library("dtype_dynamics_logit_stats", "DEF")


def bytes_moved(rows: int, width: int, element_bytes: int) -> int:
    """Device-memory bytes of the standalone pass: the input, once."""
    return rows * width * element_bytes


def flops(rows: int, width: int) -> int:
    """Integer operations (mask, maximum) of the standalone pass; there is no floating-point work."""
    return 2 * rows * width


class LogitStats:
    """Largest finite |logit| with its place, and counts of NaN, +Inf, -Inf and values beyond fp16.

    device  where the accumulator lives: that of the logits
    slots   length of the ring; `advance()` moves to the next slot, so that every step of a
            log window has its own and none is read before the window ends

    Rows are counted from 0 within each call that feeds the slot. A slot holds logits of one
    width (ValueError otherwise) and at most 2^32 - 1 elements a call.
    """

    def __init__(self, device: torch.device | str = "cpu", slots: int = 1):
        if slots < 1:
            raise ValueError(f"LogitStats: slots must be at least 1, got {slots}")
        self.counters = torch.zeros(slots, COUNTERS, dtype=torch.int64, device=device)
        self.device = self.counters.device
        self.slots = slots
        self._widths: list[int | None] = [None] * slots  # of the slots before the current one
        self._used = 1
        self._move_to(0)

    def _move_to(self, slot: int) -> None:
        """`current`: the counters of the current slot, int64 (8,), which a kernel writes to.

        `bind` uses these attributes and not the index: `torch.compile` would compile again for every slot.
        """
        self._slot, self.current = slot, self.counters[slot]
        self._width: int | None = None

    def bind(self, rows: int, width: int, device: torch.device) -> torch.Tensor:
        """Check that (rows, width) logits on `device` may enter the current slot, and return its counters."""
        if device != self.device:
            raise ValueError(f"LogitStats lives on {self.device}, the logits on {device}")
        if rows * width > MAX_ELEMENTS:
            raise ValueError(f"LogitStats: {rows} x {width} logits exceed {MAX_ELEMENTS} elements; split the rows")
        if self._width is not None and self._width != width:
            raise ValueError(f"LogitStats: this slot holds logits of width {self._width}, got {width}; advance() or reset()")
        self._width = width
        return self.current

    def advance(self) -> None:
        """Move to the next slot of the ring and clear it on the device. No sync."""
        self._widths[self._slot] = self._width
        self._move_to((self._slot + 1) % self.slots)
        self._used = min(self._used + 1, self.slots)
        self.current.zero_()

    def reset(self) -> None:
        """Clear every slot and start again at the first. No sync."""
        self.counters.zero_()
        self._widths = [None] * self.slots
        self._move_to(0)
        self._used = 1

    def read(self) -> dict[str, float | int | None]:
        """The current slot as plain numbers. Waits for the device.

        `absmax`, `row` and `col` are None when no finite value was seen. IndexError when a
        loss kernel met targets that were out of range.
        """
        return decode(self.current.tolist(), self._width)

    def read_all(self) -> list[dict[str, float | int | None]]:
        """The slots in use, oldest first, as `read` gives one. Waits for the device."""
        rows, widths = self.counters.tolist(), [*self._widths]
        widths[self._slot] = self._width
        order = [(self._slot - self._used + 1 + i) % self.slots for i in range(self._used)]
        return [decode(rows[i], widths[i]) for i in order]


def decode(counters: list[int], width: int | None) -> dict[str, float | int | None]:
    """One slot's eight integers as names and plain numbers (no torch, no device)."""
    if counters[BAD_TARGETS]:
        n = counters[BAD_TARGETS]
        raise IndexError(
            f"{n} {'target' if n == 1 else 'targets'} out of range for logits of width {width}: loss and gradient "
            f"of such a row are NaN"
        )
    absmax = row = col = None
    if counters[KEY]:
        assert width is not None  # a slot that holds values was bound to logits
        absmax = struct.unpack("<f", struct.pack("<I", counters[KEY] >> 32))[0]
        row, col = divmod(0xFFFFFFFF - (counters[KEY] & 0xFFFFFFFF), width)
    return {
        "absmax": absmax,
        "row": row,
        "col": col,
        "nan": counters[NAN],
        "pos_inf": counters[POS_INF],
        "neg_inf": counters[NEG_INF],
        "over_fp16": counters[OVER_FP16],
    }


@torch.no_grad()
def logit_stats(x: torch.Tensor, stats: LogitStats, *, impl: str = "auto") -> None:
    """Fold `x` into the current slot of `stats`. No sync, no gradient.

    x      (..., width), fp32, bf16 or fp16; row stride free, columns contiguous (others are copied)
    stats  a LogitStats on x's device; rows are x's leading dimensions, flattened

    TypeError for another dtype, ValueError for a scalar, another device or another width
    than the slot already holds.
    """
    check_float("logit_stats", "x", x)
    if x.dim() == 0:
        raise ValueError("logit_stats: x must have at least one dimension")
    choice = resolve_impl("logit_stats", impl, x.device)
    x = x.detach().reshape(-1, x.shape[-1]) if x.numel() else x.detach().new_empty(0, x.shape[-1])
    counters = stats.bind(x.shape[0], x.shape[1], x.device)
    if x.numel() == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    _accumulate(x, counters, choice)


def _run(x, counters, impl) -> None:
    if impl == "torch":
        return reference.accumulate(counters, x)
    from kernels.logit_stats import triton_kernel

    triton_kernel.launch(x, counters)


_accumulate = register(_library, "logit_stats(Tensor x, Tensor(a!) counters, str impl) -> ()", _run)
