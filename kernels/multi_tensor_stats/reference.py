"""The definition of the statistics, in plain torch and float64. Slow, obvious, any device."""

import torch

from kernels.multi_tensor_stats import stats as s


def reference_stats(
    tensors: list[torch.Tensor],
    out: s.TensorStats,
    underflow_below: float | torch.Tensor = s.UNDERFLOW_BELOW,
    raw: list[torch.Tensor] | None = None,
    max_norm: float | None = None,
    counts: bool = True,
) -> None:
    """Fill `out`. `raw` are the values whose `below` and `found_inf` count (before unscaling); default `tensors`."""
    raw = tensors if raw is None else raw
    ints, floats, device = out.words, out.words.view(torch.float64), out.words.device
    ints.zero_()
    found = torch.zeros((), dtype=torch.bool, device=device)
    for row, (x, x_raw) in enumerate(zip(tensors, raw, strict=True)):
        a, a_raw = x.detach().double().abs(), x_raw.detach().double().abs()
        finite = a.isfinite()
        floats[row, s.SUMSQ] = (a * a).sum()
        floats[row, s.NORM] = floats[row, s.SUMSQ].sqrt()
        if x.numel():
            floats[row, s.ABSMAX] = torch.where(finite, a, 0.0).amax()
        ints[row, s.NAN] = a.isnan().sum()
        ints[row, s.INF] = a.isinf().sum()
        ints[row, s.ZEROS] = (a == 0).sum()
        ints[row, s.FP16_FLUSH] = ((a > 0) & (a <= s.FP16_FLUSH_AT)).sum()
        ints[row, s.FP16_SUBNORMAL] = ((a > s.FP16_FLUSH_AT) & (a < s.FP16_NORMAL_FROM)).sum()
        ints[row, s.BELOW] = ((a_raw > 0) & (a_raw < underflow_below)).sum()
        ints[row, s.NUMEL] = x.numel()
        found |= ~a_raw.isfinite().all()
    finish(out, found, max_norm)
    if not counts:
        ints[:, s.ZEROS : s.BELOW + 1] = s.NOT_COUNTED


def finish(out: s.TensorStats, found_inf: torch.Tensor, max_norm: float | None) -> None:
    """Totals, first non-finite tensor and clip factor from the per-tensor rows."""
    ints, floats = out.words, out.words.view(torch.float64)
    ints[-1] = ints[:-1].sum(0)
    floats[-1, s.SUMSQ] = floats[:-1, s.SUMSQ].sum()
    floats[-1, s.NORM] = floats[-1, s.SUMSQ].sqrt()
    floats[-1, s.ABSMAX] = floats[:-1, s.ABSMAX].amax() if len(out) else 0.0
    bad = ints[:-1, s.NAN] + ints[:-1, s.INF] > 0
    n = len(out)
    index = torch.arange(n, device=bad.device)
    first = torch.where(bad, index, n).amin() if n else torch.tensor(0, device=bad.device)
    ints[-1, s.FIRST_NONFINITE] = torch.where(first == n, -1, first)
    out.found_inf.copy_(found_inf)
    out.clip_factor.copy_(clip_factor(out.total_norm.float(), max_norm))


def clip_factor(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """The factor of `torch.nn.utils.clip_grad_norm_`, float32: min(1, max_norm / (norm + 1e-6)); 1 without max_norm.

    torch evaluates `number / tensor` as reciprocal times number; so do we, to agree in the last bit.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)
