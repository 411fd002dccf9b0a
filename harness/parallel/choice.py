"""Which share of its steps a rank trains, by the run's settings."""

from __future__ import annotations

import torch

from bench_cases.data.batches import Batches
from harness.parallel.context import DistributedContext
from harness.parallel.strategy import NO_PARALLELISM, ParallelStrategy, ddp_share, takes_part
from harness.precision import Precision
from harness.settings import RunSettings


def strategy_for(
    settings: RunSettings,
    team: DistributedContext,
    model: torch.nn.Module,
    forward: torch.nn.Module,
    batches: Batches,
    precision: Precision,
) -> ParallelStrategy:
    """The share of a prepared model; all ranks make theirs at the same time, before the optimizer."""
    if team.ranks.world == 1:
        return NO_PARALLELISM
    if settings.parallel == "fsdp":
        from harness.parallel.fsdp import fsdp_strategy

        return fsdp_strategy(team, model, precision)
    return ddp_share(team, forward, precision.device, some_unused=_some_unused(model, batches, precision))


def _some_unused(model: torch.nn.Module, batches: Batches, precision: Precision) -> bool:
    """Whether a parameter takes no part in the loss, found by one forward pass of one row."""
    (row, *_) = batches.step(1).micro_batches(1)
    row = row.to(precision.device)
    with precision.forward():
        logits = model(row.input_ids, row.attention_mask, row.last_token)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return bool(trained - takes_part(model, logits))
