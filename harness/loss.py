"""The training loss, computed here and never inside the model.

A micro-batch contributes ``sum over its targets / normalizer``, where the normalizer counts the
targets of the *whole* step, so that one batch of 32 and four of 8 give the same loss and the
same gradients. Loss math runs in fp32; a configuration that keeps its loss in 16 bits rounds
the loss of every row to that dtype, sums in fp32, and rounds the quotient once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def training_loss(logits: torch.Tensor, targets: torch.Tensor, *, loss: str, dtype: torch.dtype,
                  normalizer: int, valid_vocab: int | None = None) -> torch.Tensor:
    """A micro-batch's share of the step's loss, a scalar of ``dtype``.

    ``logits`` (..., V) with ``targets`` (...) int64 for ``cross_entropy`` (-100 is ignored), or
    (B, C) with (B, C) for ``bce_with_logits``. Columns from ``valid_vocab`` on are padding and
    take no part.
    """
    if loss == "cross_entropy":
        rows = logits.flatten(0, -2)[:, :valid_vocab]
        total = _cross_entropy_sum(rows, targets.flatten(), dtype)
    else:
        total = _bce_sum(logits, targets, dtype)
    return (total / normalizer).to(dtype)


def _cross_entropy_sum(rows: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return F.cross_entropy(rows.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="none").float().sum()


def _bce_sum(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, targets.to(dtype), reduction="none").float().sum()
