"""Bytes that a training holds through a step: what a change costs in memory where no allocator tells its peak."""

from __future__ import annotations

from harness.loss import training_loss
from harness.training import Training
from instrument.memory import memory_split, saved_for_backward


def footprint_bytes(training: Training, step: int) -> int:
    """Weights, buffers, gradients (one a trainable weight), optimizer states as stored now, and what the forward
    pass of the step's first micro-batch keeps for backward (fp32 copies of weights among it)."""
    split = memory_split(training.model, training.optimizer)
    gradients = sum(p.numel() * p.element_size() for p in training.model.parameters() if p.requires_grad)
    batch, case = training.batches.step(step), training.settings.case
    micro = next(iter(batch.micro_batches(training.settings.micro_batch))).to(training.precision.device)
    with saved_for_backward(training.model) as saved:
        with training.precision.forward():
            logits = training.model(micro.input_ids, micro.attention_mask, micro.last_token)
        loss = training_loss(
            logits,
            micro.targets,
            loss=case.task.loss,
            dtype=training.precision.loss_dtype,
            normalizer=batch.n_targets,
            valid_vocab=training.valid_vocab,
        )
    del logits, loss  # not before: the graph must live through the block, or freed storages count again
    return split["weights_bytes"] + split["buffers_bytes"] + split["optimizer_bytes"] + gradients + saved.bytes
