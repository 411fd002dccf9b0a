"""Which share of its steps a rank trains, by the run's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.parallel.ddp import ddp_share, takes_part
from harness.parallel.share import Share

if TYPE_CHECKING:
    from harness.training import Training


def share_of(training: Training) -> Share:
    """The share of a training that is prepared but for this; all ranks make theirs at the same time."""
    return ddp_share(training.team, training.forward, training.precision.device, some_unused=_some_unused(training))


def _some_unused(training: Training) -> bool:
    """Whether a parameter takes no part in the loss, found by one forward pass of one row."""
    precision, model = training.precision, training.model
    (row, *_) = training.batches.step(1).micro_batches(1)
    row = row.to(precision.device)
    with precision.forward():
        logits = model(row.input_ids, row.attention_mask, row.last_token)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return bool(trained - takes_part(model, logits))
