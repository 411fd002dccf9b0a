"""PyTorch's dynamic loss scaler, measuring the gradients in the pass that unscales them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import TensorStats, unscale_and_stats_


class MeasuringGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose `unscale_` leaves `gradient_stats` behind.

    Everything else is the stock scaler's: its schedule, its skipped steps, its one check of the
    device a step. ``_unscale_grads_`` is the method that subclasses override (FSDP's scaler does).
    """

    gradient_stats: TensorStats
    """Of the last unscaled gradients, in the order of ``measured``; underflow counted before unscaling."""

    def __init__(self, device: str, *, init_scale: float) -> None:
        super().__init__(device, init_scale=init_scale)
        self.measured: list[torch.nn.Parameter] = []
        self.over_ranks: Callable[[TensorStats], TensorStats] = lambda mine: mine
        """Puts together the statistics of slices, where the ranks of a run have a slice of each gradient."""

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
