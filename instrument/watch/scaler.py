"""Watching a loss scaler: `torch.amp.GradScaler` has no hooks, so the instance's own method is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def wrap_unscale(scaler: torch.amp.GradScaler, around: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Run every ``scaler.unscale_`` (``step`` calls it, too) inside ``around()``; returns what undoes it."""
    original = scaler.unscale_
    was_wrapped = "unscale_" in vars(scaler)

    def unscale_(optimizer: torch.optim.Optimizer) -> None:
        with around():
            original(optimizer)

    scaler.unscale_ = unscale_

    def remove() -> None:
        if was_wrapped:
            scaler.unscale_ = original
        elif "unscale_" in vars(scaler):
            del scaler.unscale_

    return remove
