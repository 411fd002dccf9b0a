"""Binary cross-entropy with logits for multi-label targets, with logit statistics and the gradient in one pass.

The maths, per element x with target y in [0, 1] and positive weight w (default 1):

    u = exp(-|x|)      t = log1p(u)      sigmoid(x) = 1/(1+u) or u/(1+u), by the sign of x
    loss     = |x| * (x > 0 ? 1 - y : w y) + t * (1 - y + w y)
    dloss/dx = (1 - y) sigmoid(x) - w y sigmoid(-x)

No term cancels: the gradient of a confident positive is -w u/(1+u), not a rounded 1 minus 1.
At infinity the loss is its limit: 0 where the sign of x agrees with a hard target, +Inf where
it does not, and the gradient is finite (eager torch gives NaN). NaN stays NaN.

Memory traffic, counted by hand for T x L logits of b bytes and dense targets of c bytes: logits
and targets read once, gradient written once, T L (2 b + c). Sparse targets, K label indices a row:
T L 2 b + 8 T K; at L = 4,271, K = 8 and bf16 that is 0.67 of the dense traffic.
"""

import torch

from kernels.bce_with_logits import reference
from kernels.compiled_loss import register_loss
from kernels.dispatch import FLOAT_DTYPES, check_float, check_same_device, resolve_impl
from kernels.fused_loss import LossCall, check_factors, fused_loss
from kernels.logit_stats import LogitStats
from kernels.small_loss import is_small

REDUCTIONS = ("mean", "sum", "label_sum")
_library = torch.library.Library("dtype_dynamics_bce", "DEF")


def bytes_moved(
    rows: int,
    width: int,
    element_bytes: int,
    mode: str = "fused",
    *,
    dense_target_bytes: int = 0,
    labels_per_row: int = 0,
) -> int:
    """Device-memory bytes. mode: "fused" (loss and gradient), "forward" (loss), "backward" (deferred gradient)."""
    passes = {"fused": 2, "forward": 1, "backward": 2}[mode]
    return rows * (width * (passes * element_bytes + dense_target_bytes) + 8 * labels_per_row + 4)


def flops(rows: int, width: int, mode: str = "fused") -> int:
    """Elementwise floating-point operations (an exponential or a division counts as one), polynomial included."""
    return {"fused": 36, "forward": 26, "backward": 12}[mode] * rows * width


def bce_with_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    pos_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: int | float | torch.Tensor | None = None,
    grad_scale: float | torch.Tensor | None = None,
    stats: LogitStats | None = None,
    inplace_grad: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Binary cross-entropy with logits, fp32 (), with logit statistics and the gradient in one pass.

    logits        (T, L) fp32, bf16 or fp16: T documents, L labels; row stride free, columns contiguous (others copied)
    targets       dense (T, L), floating (in [0, 1]) or bool; or sparse (T, K) int64: the label indices of each
                  document in any order, filled up with -1; an index given twice counts once
    pos_weight    (L,) weight of the positive term, or None for 1
    reduction     "sum"; "mean", over all T L elements; "label_sum", sum over labels and mean over documents
    normalizer    number or device scalar that replaces the divisor, T L of "mean" or T of "label_sum": the
                  elements or documents of a whole accumulation step
    grad_scale    number or device scalar that *replaces* 1/divisor in the gradient: the loss scale times 1/divisor,
                  multiplied in before the gradient is rounded; see `cross_entropy`
    stats         a LogitStats: statistics of all logits, and a count of label indices out of range
    inplace_grad  overwrite the logits with their gradient; anyone else who saved them fails in backward

    Logits of +-Inf: the loss is the limit, 0 where the sign agrees with a hard target and +Inf where it does not,
    and the gradient is finite. NaN makes loss and gradient NaN. A label index out of range raises IndexError at once
    on a CPU (impl "torch"); elsewhere its row becomes NaN and `stats.read()` raises. Never syncs on CUDA.
    Deterministic. TypeError, ValueError: dtype, shape, device, options. RuntimeError: as in `cross_entropy`.
    """
    if is_small(logits, impl, inplace_grad):
        loss = reference.small_bce(logits, targets, pos_weight, reduction, normalizer, grad_scale, stats)
        if loss is not None:
            return loss
    check_float("bce_with_logits", "logits", logits)
    choice = resolve_impl("bce_with_logits", impl, logits.device)
    sparse = _check(logits, targets, pos_weight, reduction, normalizer, grad_scale)
    if logits.stride(1) != 1 and not inplace_grad:
        logits = logits.contiguous()
    targets = targets if targets.shape[1] <= 1 or targets.stride(1) == 1 else targets.contiguous()
    pos_weight = None if pos_weight is None else pos_weight.float().contiguous()
    counters = None if stats is None else stats.bind(logits.shape[0], logits.shape[1], logits.device)
    options = {"sparse": sparse, "pos_weight": pos_weight}
    call = BceCall(choice, targets, reduction, normalizer, grad_scale, counters, options)
    return fused_loss(logits, call, inplace_grad=inplace_grad, compiled=_compiled)


def _check(logits, targets, pos_weight, reduction, normalizer, grad_scale) -> bool:
    """Raise on misuse; return whether the targets are sparse."""
    op = "bce_with_logits"
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must have shape (T, L) with L >= 1, got {tuple(logits.shape)}")
    sparse = targets.dtype == torch.int64
    if not sparse and targets.dtype not in (*FLOAT_DTYPES, torch.bool):
        raise TypeError(f"{op}: targets must be floating or bool (dense) or int64 (sparse), got {str(targets.dtype)[6:]}")
    if targets.dim() != 2 or targets.shape[0] != logits.shape[0]:
        raise ValueError(f"{op}: targets must have shape ({logits.shape[0]}, ...), got {tuple(targets.shape)}")
    if not sparse and targets.shape != logits.shape:
        raise ValueError(f"{op}: dense targets must have shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if pos_weight is not None and pos_weight.shape != logits.shape[1:]:
        raise ValueError(f"{op}: pos_weight must have shape ({logits.shape[1]},), got {tuple(pos_weight.shape)}")
    check_same_device(op, logits.device, targets=targets, pos_weight=pos_weight)
    check_factors(op, reduction, REDUCTIONS, normalizer, grad_scale, logits.device)
    return sparse


class BceCall(LossCall):
    """One call of bce_with_logits. Options: sparse (targets are label lists) and pos_weight."""

    name = "bce_with_logits"

    def default_factor(self, logits):
        divisor = logits.numel() if self.reduction == "mean" else logits.shape[0]
        return 1.0 / divisor if divisor else float("inf")  # the mean of nothing is 0 * Inf = NaN, as in torch


def _write_rows(logits, targets, grad, losses, factor, counters, impl, **options) -> None:
    if impl == "torch":
        reference.rows(logits, targets, grad, losses, factor, counters=counters, **options)
    else:
        from kernels.bce_with_logits import triton_kernel

        triton_kernel.launch(logits, targets, grad, losses, factor, counters, **options)


_compiled = register_loss(_library, BceCall, {"sparse": "bool", "pos_weight": "Tensor?"}, _write_rows)
