"""A run's model, optimizer and batches, ready to train, and able to run any of its steps again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench_cases import Case
from bench_cases.data.batches import Batches
from harness.loop import LoopOptions, train
from harness.parallel.context import SINGLE_PROCESS, DistributedContext
from harness.parallel.strategy import NO_PARALLELISM, ParallelStrategy, SummedGradients, ddp_strategy, takes_part
from harness.precision import Precision
from harness.settings import MAX_NORM, RunSettings
from instrument.replay.recorder import OpRecorder
from instrument.replay.snapshot import NamedState, Snapshot
from instrument.watch.meter import Reading, StepMeter
from instrument.watch.taps import ModuleTaps

DROPOUT_OF_RANKS = 15_485_863
"""Ranks draw other dropout masks: the distance of their seeds, a prime."""


@dataclass
class Training:
    """``model`` is prepared (device, dtypes, head); ``forward`` is the same model, compiled where asked. Of several processes
    (``context``) each trains its part of a step, as ``strategy`` says, and replays it on the bare model (``replayed``)."""

    settings: RunSettings
    model: torch.nn.Module
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    precision: Precision
    context: DistributedContext = SINGLE_PROCESS
    strategy: ParallelStrategy = NO_PARALLELISM
    replayed: ParallelStrategy = NO_PARALLELISM

    @classmethod
    def prepare(
        cls,
        settings: RunSettings,
        model: torch.nn.Module,
        batches: Batches,
        precision: Precision,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> Training:
        """Put a freshly built model and its optimizer under the configuration."""
        model = precision.prepare(model)
        precision.observe_head(model)
        forward = torch.compile(model) if settings.compile else model
        strategy = strategy_for(settings, context, model, forward, batches, precision)
        optimizer = precision.make_optimizer(
            lr=settings.lr, weight_decay=settings.case.weight_decay, seed=strategy.seed(settings.seed)
        )
        alone = context.ranks.world == 1
        replayed = NO_PARALLELISM if alone else SummedGradients(context, precision.parameters)
        return cls(settings, model, forward, optimizer, batches, precision, context, strategy, replayed)

    @property
    def valid_vocab(self) -> int | None:
        """Columns of a language model's head that mean something: the others pad the vocabulary."""
        return None if self.settings.case.task.head == "classification" else self.batches.data.valid_vocab

    @property
    def options(self) -> LoopOptions:
        """What the loop needs to know."""
        s = self.settings
        return LoopOptions(
            max_steps=s.max_steps,
            warmup_steps=s.warmup_steps,
            micro_batch=s.micro_batch,
            peak_lr=s.lr,
            max_norm=MAX_NORM,
            valid_vocab=self.valid_vocab,
            seed=s.seed + DROPOUT_OF_RANKS * self.context.ranks.rank,
        )

    def meter(self, window: int, taps: ModuleTaps | None = None, recorder: OpRecorder | None = None) -> StepMeter:
        """A meter over this training; ``window`` steps are read at a time."""
        s = self.settings
        return StepMeter(
            self.model,
            self.optimizer,
            self.precision.device,
            window=window,
            taps=taps,
            recorder=recorder,
            gather=self.context.gather,
            micro_batches=self.strategy.count(s.batch_size // s.micro_batch),
            warmup_steps=s.warmup_steps,
            uninformed_loss=uninformed_loss(s.case, self.batches.data.n_labels),
            named_parameters=self.strategy.named_parameters(self.model),
        )

    def train(
        self, meter: StepMeter, steps: Iterable[int] | None = None, cut: Callable[[int], bool] = lambda step: False
    ) -> Iterator[Reading]:
        """Train, all steps or the given ones; ``cut`` asks for a reading after a step."""
        return self._steps(self.strategy.trained(self.forward), meter, steps, cut, self.strategy)

    def again(self, step: int, recorder: OpRecorder | None = None, taps: ModuleTaps | None = None) -> Reading:
        """Run one step from the present state, eagerly; a recorder gets the losses. All ranks do."""
        (reading,) = self._steps(self.model, self.meter(1, taps, recorder), [step], lambda step: False, self.replayed)
        return reading

    def _steps(self, model, meter, steps, cut, strategy) -> Iterator[Reading]:
        made = self.optimizer, self.batches, self.precision, meter, self.options
        return train(self.settings.case, model, *made, steps, cut, strategy)

    def snapshot(self, step: int) -> Snapshot:
        """The state after ``step`` steps, in host memory, to go back to."""
        return Snapshot(step, self.model, self.optimizer, self.precision.scaler)

    def state(self, step: int) -> NamedState | None:
        """The state after ``step`` steps, for a checkpoint: rank 0's; None on the others. All ranks call it."""
        return self.strategy.state(step, self.model, self.optimizer, self.precision.scaler)

    def restore(self, state: NamedState) -> None:
        """Put a stored state into this freshly prepared training; raises `ValueError` when it does not fit."""
        self.strategy.restore(state, self.model, self.optimizer, self.precision.scaler)


def uninformed_loss(case: Case, labels: int) -> float:
    """The loss of a model that gives every label the probability 1/2, as one without a prior nearly does at its start; 0 for a
    case without a prior, whose own first loss says it."""
    if case.head_prior == "none":
        return 0.0
    return math.log(2) * (labels if case.loss_reduction == "label_sum" else 1)


def strategy_for(
    settings: RunSettings,
    context: DistributedContext,
    model: torch.nn.Module,
    forward: torch.nn.Module,
    batches: Batches,
    precision: Precision,
) -> ParallelStrategy:
    """The strategy of a prepared model; all ranks make theirs at the same time, before the optimizer."""
    if context.ranks.world == 1:
        return NO_PARALLELISM
    if settings.parallel == "fsdp":
        from harness.parallel.fsdp import fsdp_strategy

        return fsdp_strategy(context, model, precision)
    return ddp_strategy(context, forward, precision.device, some_unused=_some_unused(model, batches, precision))


def _some_unused(model: torch.nn.Module, batches: Batches, precision: Precision) -> bool:
    """Whether a parameter takes no part in the loss, found by one forward pass of one row."""
    (row, *_) = batches.step(1).micro_batches(1)
    row = row.to(precision.device)
    with precision.forward():
        logits = model(row.input_ids, row.attention_mask, row.last_token)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return bool(trained - takes_part(model, logits))
