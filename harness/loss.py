"""The training loss, computed here and never inside the model.

A micro-batch contributes ``sum over its targets / normalizer``, where the normalizer counts the
targets of the *whole* step, so that one batch of 32 and four of 8 give the same loss and the
same gradients. Where a configuration's loss math is fp32, the fused losses of `kernels` compute
loss, gradient and logit statistics together. A configuration that keeps its loss in 16 bits
rounds the loss of every row to that dtype, sums in fp32, and rounds the quotient once; its
statistics are a pass of their own.

`MeasuringGradScaler` is PyTorch's dynamic loss scaler, which measures the gradients in the pass that unscales them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import LogitStats, TensorStats, bce_with_logits, cross_entropy, logit_stats, unscale_and_stats_

IGNORE_INDEX = -100


def training_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    loss: str,
    dtype: torch.dtype,
    normalizer: int,
    valid_vocab: int | None = None,
    loss_scale: torch.Tensor | None = None,
    stats: LogitStats | None = None,
) -> torch.Tensor:
    """A micro-batch's share of the step's loss, a scalar of ``dtype``.

    ``logits`` (..., V) with ``targets`` (...) int64 for ``cross_entropy`` (-100 is ignored), or
    (B, C) with (B, C) for ``bce_with_logits``. Columns from ``valid_vocab`` on are padding and
    take no part. ``loss_scale``, a device scalar, multiplies the gradient before it is rounded and
    leaves the loss alone, so call ``backward()`` on the result as it is. ``stats`` gets the
    statistics of the logits whose target counts.
    """
    if loss == "cross_entropy":
        logits, targets = logits.flatten(0, -2), targets.flatten()
    if dtype != torch.float32:
        if stats is not None:
            logit_stats(_counted(logits.detach(), targets, valid_vocab), stats)
        return (_sum_of_rounded_rows(logits, targets, loss, dtype, valid_vocab) / normalizer).to(dtype)
    options = {"normalizer": normalizer, "stats": stats, "grad_scale": None if loss_scale is None else loss_scale / normalizer}
    if loss == "cross_entropy":
        return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, valid_vocab=valid_vocab, **options)
    return bce_with_logits(logits, targets, **options)


def _sum_of_rounded_rows(
    logits: torch.Tensor, targets: torch.Tensor, loss: str, dtype: torch.dtype, valid_vocab: int | None
) -> torch.Tensor:
    """The fp32 sum of per-row losses that were rounded to ``dtype``."""
    if loss == "cross_entropy":
        rows = F.cross_entropy(logits[:, :valid_vocab], targets, ignore_index=IGNORE_INDEX, reduction="none")
    else:
        rows = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), reduction="none")
    return rows.float().sum()


def _counted(logits: torch.Tensor, targets: torch.Tensor, valid_vocab: int | None) -> torch.Tensor:
    """The logits that count: ignored rows as zeros, pad columns cut off."""
    values = logits[:, :valid_vocab]
    if targets.dtype != torch.int64 or targets.ndim != 1:
        return values
    return values.masked_fill((targets == IGNORE_INDEX).unsqueeze(1), 0)


class MeasuringGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose `unscale_` keeps `gradient_stats`.

    Everything else is the stock scaler's: its schedule, its skipped steps, its one check of the
    device a step. ``_unscale_grads_`` is the method that subclasses override (FSDP's scaler does).
    """

    gradient_stats: TensorStats
    """Of the last unscaled gradients, in the order of ``measured``; underflow counted before unscaling."""

    def __init__(self, device: str, *, init_scale: float) -> None:
        super().__init__(device, init_scale=init_scale)
        self.measured: list[torch.nn.Parameter] = []
        self.over_ranks: Callable[[TensorStats], TensorStats] = lambda mine: mine
        """Combines the statistics of slices, where the ranks of a run have a slice of each gradient."""

    def scale_now(self, device: torch.device) -> torch.Tensor:
        """The loss scale as a device scalar, without a sync."""
        return self.scale(torch.ones((), device=device))

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        self.gradient_stats = self.over_ranks(unscale_and_stats_(gradients_of(self.measured), inv_scale))
        found_inf.copy_(self.gradient_stats.found_inf)
        return {found_inf.device: found_inf}


def gradients_of(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients, an empty tensor for a parameter that took no part, so that indices stay the parameters'."""
    return [p.new_empty(0) if p.grad is None else p.grad for p in parameters]
