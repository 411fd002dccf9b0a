"""The result of multi_tensor_stats, and its definition in plain torch and float64: slow, obvious, any device.

A result is one row of 12 eight-byte figures per tensor and one for the total. It lives in one int64 tensor `table`
of shape (n + 1, 12), row n being the total, so that it is one small allocation, one copy to the host, and a ring of
them is one tensor. Floating-point figures are float64 bits in the same storage.
"""

from dataclasses import dataclass

import torch

from kernels.float_formats import FP16

# Columns of the table. sumsq, norm, absmax are float64 bits; the last holds two float32.
SUMSQ, NORM, ABSMAX, NAN, INF, ZEROS, FP16_FLUSH, FP16_SUBNORMAL, BELOW, NUMEL, FIRST_NONFINITE, SCALER = range(12)
COLUMNS = 12
NOT_COUNTED = -1  # in the cells of a pass without counts; `read()` turns it into None
FOUND_INF_F32, CLIP_FACTOR_F32 = 2 * SCALER, 2 * SCALER + 1  # columns of the float32 view

UNDERFLOW_BELOW = FP16.smallest_subnormal
FP16_FLUSH_AT = UNDERFLOW_BELOW / 2  # |x| <= this rounds to 0 in fp16 (the tie goes to the even 0)
FP16_NORMAL_FROM = FP16.smallest_normal - FP16_FLUSH_AT  # |x| >= this rounds to a normal fp16 (again ties to even)


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
    All are views of `table`: an op that gets this object as `out=` overwrites them in place.

    * `sumsq`, `norm`: of all elements, so NaN or Inf when one is (as an eager norm is); the norm of
      finite elements is finite whenever float64 holds its square: always, for 32-bit input and less.
    * `absmax`: largest finite |x|, 0 when there is none.
    * `fp16_flush`: x != 0 that rounds to 0 in fp16, |x| <= 2^-25.
      `fp16_subnormal`: rounds to a subnormal fp16, 2^-25 < |x| < 2^-14 - 2^-25.
    * `below`: 0 < |x| < the threshold given to the op (default 2^-24).
    """

    def __init__(self, table: torch.Tensor):
        self.table = table

    def __getattr__(self, name: str) -> torch.Tensor:
        total, column = name.startswith("total_"), name.removeprefix("total_")
        if column in _FLOAT_COLUMNS:
            view = self.table.view(torch.float64)[:, _FLOAT_COLUMNS[column]]
        elif column in _INT_COLUMNS:
            view = self.table[:, _INT_COLUMNS[column]]
        else:
            raise AttributeError(f"TensorStats has no attribute {name!r}")
        return view[-1] if total else view[:-1]

    @property
    def first_nonfinite_index(self) -> torch.Tensor:
        return self.table[-1, FIRST_NONFINITE]

    @property
    def found_inf(self) -> torch.Tensor:
        return self.table.view(torch.float32)[-1, FOUND_INF_F32]

    @property
    def clip_factor(self) -> torch.Tensor:
        return self.table.view(torch.float32)[-1, CLIP_FACTOR_F32]

    @classmethod
    def allocate(cls, n_tensors: int, device: torch.device | str) -> "TensorStats":
        """An uninitialised result for a list of `n_tensors`, to be passed as `out=`."""
        return cls(torch.empty((n_tensors + 1, COLUMNS), dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return self.table.shape[0] - 1

    def read(self) -> StatsReading:
        """Plain numbers; on CUDA one copy and the only sync."""
        table = self.table.cpu()
        floats, ints = table.view(torch.float64)[:, :NAN].tolist(), table.tolist()
        counts = ([None if n == NOT_COUNTED else n for n in row[NAN : NUMEL + 1]] for row in ints)
        rows = tuple(Reading(*f, *n) for f, n in zip(floats, counts, strict=True))
        first = ints[-1][FIRST_NONFINITE]
        found_inf, clip_factor = table.view(torch.float32)[-1, FOUND_INF_F32:].tolist()
        return StatsReading(rows[:-1], rows[-1], None if first < 0 else first, bool(found_inf), clip_factor)


_FLOAT_COLUMNS = {"sumsq": SUMSQ, "norm": NORM, "absmax": ABSMAX}
_INT_COLUMNS = {
    "nan": NAN, "inf": INF, "zeros": ZEROS, "fp16_flush": FP16_FLUSH, "fp16_subnormal": FP16_SUBNORMAL, "below": BELOW,
    "numel": NUMEL,
}  # fmt: skip


def reference_stats(
    tensors: list[torch.Tensor],
    out: TensorStats,
    underflow_below: float | torch.Tensor = UNDERFLOW_BELOW,
    raw: list[torch.Tensor] | None = None,
    max_norm: float | None = None,
    counts: bool = True,
) -> None:
    """Fill `out`. `raw` are the values whose `below` and `found_inf` count (before unscaling); default `tensors`."""
    raw = tensors if raw is None else raw
    ints, floats, device = out.table, out.table.view(torch.float64), out.table.device
    ints.zero_()
    found = torch.zeros((), dtype=torch.bool, device=device)
    for row, (x, x_raw) in enumerate(zip(tensors, raw, strict=True)):
        a, a_raw = x.detach().double().abs(), x_raw.detach().double().abs()
        finite = a.isfinite()
        floats[row, SUMSQ] = (a * a).sum()
        floats[row, NORM] = floats[row, SUMSQ].sqrt()
        if x.numel():
            floats[row, ABSMAX] = torch.where(finite, a, 0.0).amax()
        ints[row, NAN] = a.isnan().sum()
        ints[row, INF] = a.isinf().sum()
        ints[row, ZEROS] = (a == 0).sum()
        ints[row, FP16_FLUSH] = ((a > 0) & (a <= FP16_FLUSH_AT)).sum()
        ints[row, FP16_SUBNORMAL] = ((a > FP16_FLUSH_AT) & (a < FP16_NORMAL_FROM)).sum()
        ints[row, BELOW] = ((a_raw > 0) & (a_raw < underflow_below)).sum()
        ints[row, NUMEL] = x.numel()
        found |= ~a_raw.isfinite().all()
    _finish(out, found, max_norm)
    if not counts:
        ints[:, ZEROS : BELOW + 1] = NOT_COUNTED


def _finish(out: TensorStats, found_inf: torch.Tensor, max_norm: float | None) -> None:
    """Totals, first non-finite tensor and clip factor from the per-tensor rows."""
    ints, floats = out.table, out.table.view(torch.float64)
    ints[-1] = ints[:-1].sum(0)
    floats[-1, SUMSQ] = floats[:-1, SUMSQ].sum()
    floats[-1, NORM] = floats[-1, SUMSQ].sqrt()
    floats[-1, ABSMAX] = floats[:-1, ABSMAX].amax() if len(out) else 0.0
    bad = ints[:-1, NAN] + ints[:-1, INF] > 0
    n = len(out)
    index = torch.arange(n, device=bad.device)
    first = torch.where(bad, index, n).amin() if n else torch.tensor(0, device=bad.device)
    ints[-1, FIRST_NONFINITE] = torch.where(first == n, -1, first)
    out.found_inf.copy_(found_inf)
    out.clip_factor.copy_(clip_factor(out.total_norm.float(), max_norm))


def clip_factor(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """The factor of `torch.nn.utils.clip_grad_norm_`, float32: min(1, max_norm / (norm + 1e-6)); 1 without max_norm.

    torch evaluates `number / tensor` as reciprocal times number; so do we, to agree in the last bit.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)
