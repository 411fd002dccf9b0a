"""The training loop. Nothing here waits for the device between two log points, except the loss
scaler's own check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench_cases import Case
from harness.loss import training_loss
from harness.optimizer import learning_rate
from harness.parallel.strategy import NO_PARALLELISM, ParallelStrategy
from harness.precision import Precision
from instrument.watch.meter import Reading, StepMeter


@dataclass(frozen=True)
class LoopOptions:
    """What the loop needs to know beside its objects. ``peak_lr`` is the schedule's."""

    max_steps: int
    warmup_steps: int
    micro_batch: int
    peak_lr: float
    max_norm: float
    valid_vocab: int | None
    seed: int = 0


def train(
    case: Case,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches,
    precision: Precision,
    meter: StepMeter,
    options: LoopOptions,
    steps: Iterable[int] | None = None,
    cut: Callable[[int], bool] = lambda step: False,
    strategy: ParallelStrategy = NO_PARALLELISM,
) -> Iterator[Reading]:
    """Train step by step (all of them, or ``steps``); yields a `Reading` at every log point and wherever
    ``cut(step)`` asks for one, and ends after a divergence. ``strategy``: this process' part of each step."""
    steps = list(range(1, options.max_steps + 1) if steps is None else steps)
    for step in steps:
        lr = learning_rate(step, peak=options.peak_lr, warmup_steps=options.warmup_steps, max_steps=options.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(options.seed * 1_000_003 + step)  # dropout, where asked for, repeats with its step
        scale = precision.loss_scale()
        meter.begin_step(step, lr, scale)
        batch = batches.step(step)
        meter.count(batch)

        for micro in strategy.of(batch.micro_batches(options.micro_batch)):
            micro = micro.to(precision.device)
            with precision.forward():
                logits = model(micro.input_ids, micro.attention_mask, micro.last_token)
            logits = precision.check_logits(logits)
            loss = training_loss(
                logits,
                micro.targets,
                loss=case.task.loss,
                dtype=precision.loss_dtype,
                normalizer=batch.n_targets,
                valid_vocab=options.valid_vocab,
                loss_scale=scale,
                stats=meter.next_logits(),
            )
            meter.add_loss(loss)
            loss.backward()
        strategy.sum_gradients()

        gradients = precision.measure_gradients(optimizer)
        norm = precision.clip(gradients.total_norm, options.max_norm)
        meter.gradients(gradients, clip_norm=norm)
        precision.update(optimizer)
        meter.updated()
        optimizer.zero_grad(set_to_none=True)
        meter.end_step()

        if meter.due or cut(step) or step == steps[-1]:
            reading = meter.read()
            yield reading
            if reading.divergence is not None:
                return
