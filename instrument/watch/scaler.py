"""Watching a loss scaler: `torch.amp.GradScaler` has no hooks, so the instance's own method is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch


class _Unscale:
    """``scaler.unscale_`` with others around it; a copy of the scaler gets the plain method, bound to itself."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.original: Callable | None = vars(scaler).get("unscale_")  # somebody else's replacement
        self.around: list[Callable[[], AbstractContextManager]] = []

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        with ExitStack() as stack:
            for around in self.around:
                stack.enter_context(around())
            (self.original or _plain(self.scaler))(optimizer)

    def __reduce__(self) -> tuple:
        return _plain, (self.scaler,)


def _plain(scaler: torch.amp.GradScaler) -> Callable:
    return type(scaler).unscale_.__get__(scaler)


def wrap_unscale(scaler: torch.amp.GradScaler, around: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Run every ``scaler.unscale_`` (``step`` calls it, too) inside ``around()``, whoever else wraps it; returns
    what undoes it, in any order."""
    wrapped = vars(scaler).get("unscale_")
    if not isinstance(wrapped, _Unscale):
        wrapped = scaler.unscale_ = _Unscale(scaler)
    wrapped.around.append(around)

    def remove() -> None:
        if around in wrapped.around:
            wrapped.around.remove(around)
        if not wrapped.around and vars(scaler).get("unscale_") is wrapped:
            del scaler.unscale_
            if wrapped.original is not None:
                scaler.unscale_ = wrapped.original

    return remove
