"""LogitStats: a small accumulator that lives on the device, and a ring of them for a log window."""

import struct
from collections.abc import Callable

import torch

# Words of a slot, all int64. KEY packs (fp32 bits of |x|) << 32 | (2^32 - 1 - flat index); 0 is "nothing seen".
KEY, NAN, POS_INF, NEG_INF, OVER_FP16, BAD_TARGETS = range(6)
WORDS = 8
MAX_ELEMENTS = 2**32 - 1


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
        self.words = torch.zeros(slots, WORDS, dtype=torch.int64, device=device)
        self.device = self.words.device
        self.slots = slots
        self._widths: list[int | None] = [None] * slots  # of the slots left behind
        self._used = 1
        self._move_to(0)

    def _move_to(self, slot: int) -> None:
        """`current`: the words of the current slot, int64 (8,), which a kernel writes to.

        `bind` uses these attributes and not the index: `torch.compile` would compile again for every slot.
        """
        self._slot, self.current = slot, self.words[slot]
        self._width: int | None = None

    def bind(self, rows: int, width: int, device: torch.device) -> torch.Tensor:
        """Check that (rows, width) logits on `device` may enter the current slot, and return its words."""
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
        self.words.zero_()
        self._widths = [None] * self.slots
        self._move_to(0)
        self._used = 1

    def read(self) -> dict[str, float | int | None]:
        """The current slot as plain numbers. The one call here that waits for the device.

        `absmax`, `row` and `col` are None when no finite value was seen. IndexError when a
        loss kernel met targets that were out of range.
        """
        return decode(self.current.tolist(), self._width)

    def read_async(self) -> Callable[[], list[dict[str, float | int | None]]]:
        """Start copying the ring to the host; call the result, on any thread, for its slots, oldest first.

        The copy is ordered after the work already queued on the current stream. Only the
        returned callable waits, and only for that copy.
        """
        order = [(self._slot - self._used + 1 + i) % self.slots for i in range(self._used)]
        widths = [*(self._widths[i] for i in order[:-1]), self._width]
        on_cuda = self.device.type == "cuda"
        host = torch.empty(self.words.shape, dtype=torch.int64, pin_memory=on_cuda)
        host.copy_(self.words, non_blocking=True)
        done = None
        if on_cuda:
            done = torch.cuda.Event()
            done.record()

        def finish():
            if done is not None:
                done.synchronize()
            rows = host.tolist()
            return [decode(rows[i], width) for i, width in zip(order, widths, strict=True)]

        return finish


def decode(words: list[int], width: int | None) -> dict[str, float | int | None]:
    """One slot's eight integers as names and plain numbers (no torch, no device)."""
    if words[BAD_TARGETS]:
        n = words[BAD_TARGETS]
        raise IndexError(
            f"{n} {'target' if n == 1 else 'targets'} out of range for logits of width {width}: loss and gradient "
            f"of such a row are NaN"
        )
    absmax = row = col = None
    if words[KEY]:
        absmax = struct.unpack("<f", struct.pack("<I", words[KEY] >> 32))[0]
        row, col = divmod(0xFFFFFFFF - (words[KEY] & 0xFFFFFFFF), width)
    return {
        "absmax": absmax,
        "row": row,
        "col": col,
        "nan": words[NAN],
        "pos_inf": words[POS_INF],
        "neg_inf": words[NEG_INF],
        "over_fp16": words[OVER_FP16],
    }
