"""The result of a pass over a list of tensors: one row of 12 eight-byte words per tensor, one for the total.

Everything lives in one int64 tensor `words` of shape (n + 1, 12), row n being the
total, so that a result is one small allocation, one copy to the host, and a ring
of them is one tensor. Floating-point words are float64 bits in the same storage.
"""

from dataclasses import dataclass

import torch

# Word of a row. sumsq, norm, absmax are float64 bits; the last word holds two float32.
SUMSQ, NORM, ABSMAX, NAN, INF, ZEROS, FP16_FLUSH, FP16_SUBNORMAL, BELOW, NUMEL, FIRST_NONFINITE, SCALER = range(12)
WORDS = 12
NOT_COUNTED = -1  # in the cells of a pass without counts; `read()` turns it into None
FOUND_INF_F32, CLIP_FACTOR_F32 = 2 * SCALER, 2 * SCALER + 1  # columns of the float32 view

FP16_FLUSH_AT = 2.0**-25  # |x| <= this rounds to 0 in fp16 (the tie goes to the even 0)
FP16_NORMAL_FROM = 2.0**-14 - 2.0**-25  # |x| >= this rounds to a normal fp16 (again ties to even)
UNDERFLOW_BELOW = 2.0**-24  # smallest fp16 subnormal


@dataclass(frozen=True)
class Reading:
    """Plain numbers of one row: `numel` elements, of which `nan + inf` are not finite. None: not counted."""

    sumsq: float
    norm: float
    absmax: float
    nan: int
    inf: int
    zeros: int | None
    fp16_flush: int | None
    fp16_subnormal: int | None
    below: int | None
    numel: int

    @property
    def nonfinite(self) -> int:
        return self.nan + self.inf

    @property
    def below_frac(self) -> float | None:
        """Share of the nonzero elements below the threshold; None when none is nonzero or none was counted."""
        nonzero = self.numel - self.zeros if self.zeros is not None else 0
        return self.below / nonzero if nonzero else None


@dataclass(frozen=True)
class StatsReading:
    """Plain numbers of a whole list. `first_nonfinite_index` is None when every value is finite."""

    tensors: tuple[Reading, ...]
    total: Reading
    first_nonfinite_index: int | None
    found_inf: bool
    clip_factor: float


class TensorStats:
    """Statistics of n tensors on one device, readable there without a sync.

    Per tensor, tensors of shape (n,): `sumsq`, `norm`, `absmax` (float64), `nan`, `inf`,
    `zeros`, `fp16_flush`, `fp16_subnormal`, `below`, `numel` (int64).
    Of the whole list, 0-d tensors: the same names with the prefix `total_`, and
    `first_nonfinite_index` (int64, -1: none), `found_inf` and `clip_factor` (float32, 0-d).
    All are views of `words`: an op that gets this object as `out=` overwrites them in place.

    * `sumsq`, `norm`: of all elements, so NaN or Inf when one is (as an eager norm is); the norm of
      finite elements is finite whenever float64 holds its square: always, for 32-bit input and less.
    * `absmax`: largest finite |x|, 0 when there is none.
    * `fp16_flush`: x != 0 that rounds to 0 in fp16, |x| <= 2^-25.
      `fp16_subnormal`: rounds to a subnormal fp16, 2^-25 < |x| < 2^-14 - 2^-25.
    * `below`: 0 < |x| < the threshold given to the op (default 2^-24).
    """

    def __init__(self, words: torch.Tensor):
        self.words = words

    def __getattr__(self, name: str) -> torch.Tensor:
        total, column = name.startswith("total_"), name.removeprefix("total_")
        if column in _FLOAT_COLUMNS:
            view = self.words.view(torch.float64)[:, _FLOAT_COLUMNS[column]]
        elif column in _INT_COLUMNS:
            view = self.words[:, _INT_COLUMNS[column]]
        else:
            raise AttributeError(f"TensorStats has no attribute {name!r}")
        return view[-1] if total else view[:-1]

    @property
    def first_nonfinite_index(self) -> torch.Tensor:
        return self.words[-1, FIRST_NONFINITE]

    @property
    def found_inf(self) -> torch.Tensor:
        return self.words.view(torch.float32)[-1, FOUND_INF_F32]

    @property
    def clip_factor(self) -> torch.Tensor:
        return self.words.view(torch.float32)[-1, CLIP_FACTOR_F32]

    @classmethod
    def allocate(cls, n_tensors: int, device: torch.device | str) -> "TensorStats":
        """An uninitialised result for a list of `n_tensors`, to be passed as `out=`."""
        return cls(torch.empty((n_tensors + 1, WORDS), dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return self.words.shape[0] - 1

    def read(self) -> StatsReading:
        """Plain numbers; on CUDA one copy and the only sync."""
        return decode(self.words.cpu())

    def read_total(self) -> StatsReading:
        """As `read`, but only the total row is copied: `tensors` is empty."""
        return decode(self.words[-1:].cpu())


_FLOAT_COLUMNS = {"sumsq": SUMSQ, "norm": NORM, "absmax": ABSMAX}
_INT_COLUMNS = {
    "nan": NAN,
    "inf": INF,
    "zeros": ZEROS,
    "fp16_flush": FP16_FLUSH,
    "fp16_subnormal": FP16_SUBNORMAL,
    "below": BELOW,
    "numel": NUMEL,
}


def _count(word: int) -> int | None:
    return None if word == NOT_COUNTED else word


def decode(words: torch.Tensor) -> StatsReading:
    """Plain numbers from `words` (rows, 12) int64 on the CPU; the last row is the total.

    For rings: copy `stats.words[-1]` to a row of a pinned buffer and decode it later as `row[None]`.
    """
    if words.device.type != "cpu" or words.shape[-1] != WORDS:
        raise ValueError(f"decode: words must be (rows, {WORDS}) on the CPU, got {tuple(words.shape)} on {words.device}")
    words = words.contiguous()
    floats, ints = words.view(torch.float64)[:, :NAN].tolist(), words.tolist()
    rows = tuple(Reading(*f, *map(_count, i[NAN : NUMEL + 1])) for f, i in zip(floats, ints, strict=True))
    first = ints[-1][FIRST_NONFINITE]
    found_inf, clip_factor = words.view(torch.float32)[-1, FOUND_INF_F32:].tolist()
    return StatsReading(rows[:-1], rows[-1], None if first < 0 else first, bool(found_inf), clip_factor)
