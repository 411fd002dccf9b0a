"""A run's model, optimizer and batches, ready to train, and able to run any of its steps again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench_cases.data.batches import Batches
from harness.loop import LoopOptions, train
from harness.parallel.choice import strategy_for
from harness.parallel.context import SINGLE_PROCESS, DistributedContext
from harness.parallel.strategy import NO_PARALLELISM, ParallelStrategy, SummedGradients
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
    """``model`` is prepared (device, dtypes, head); ``forward`` is the same model, compiled where asked. Of several
    processes (``team``) each trains its ``share`` of a step, and replays its ``replayed`` one on the bare model."""

    settings: RunSettings
    model: torch.nn.Module
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    precision: Precision
    valid_vocab: int | None
    team: DistributedContext = SINGLE_PROCESS
    share: ParallelStrategy = NO_PARALLELISM
    replayed: ParallelStrategy = NO_PARALLELISM

    @classmethod
    def prepare(
        cls,
        settings: RunSettings,
        model: torch.nn.Module,
        batches: Batches,
        precision: Precision,
        valid_vocab: int | None,
        team: DistributedContext = SINGLE_PROCESS,
    ) -> Training:
        """Put a freshly built model and its optimizer under the configuration."""
        model = precision.prepare(model)
        forward = torch.compile(model) if settings.compile else model
        share = strategy_for(settings, team, model, forward, batches, precision)
        optimizer = precision.make_optimizer(
            lr=settings.lr, weight_decay=settings.case.weight_decay, seed=share.seed(settings.seed)
        )
        return cls(
            settings,
            model,
            forward,
            optimizer,
            batches,
            precision,
            valid_vocab,
            team,
            share,
            NO_PARALLELISM if team.ranks.world == 1 else SummedGradients(team, precision.parameters),
        )

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
            seed=s.seed + DROPOUT_OF_RANKS * self.team.ranks.rank,
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
            gather=self.team.gather,
            micro_batches=self.share.count(s.batch_size // s.micro_batch),
            warmup_steps=s.warmup_steps,
            named_parameters=self.share.named_parameters(self.model),
        )

    def train(
        self, meter: StepMeter, steps: Iterable[int] | None = None, cut: Callable[[int], bool] = lambda step: False
    ) -> Iterator[Reading]:
        """Train, all steps or the given ones; ``cut`` asks for a reading after a step."""
        return train(
            self.settings.case,
            self.share.trained(self.forward),
            self.optimizer,
            self.batches,
            self.precision,
            meter,
            self.options,
            steps,
            cut,
            self.share,
        )

    def again(self, step: int, recorder: OpRecorder | None = None, taps: ModuleTaps | None = None) -> Reading:
        """Run one step from the present state, eagerly; a recorder gets the losses. All ranks do."""
        meter = self.meter(1, taps, recorder)
        (reading,) = train(
            self.settings.case,
            self.model,
            self.optimizer,
            self.batches,
            self.precision,
            meter,
            self.options,
            [step],
            share=self.replayed,
        )
        return reading

    def snapshot(self, step: int) -> Snapshot:
        """The state after ``step`` steps, in host memory, to go back to."""
        return Snapshot(step, self.model, self.optimizer, self.precision.scaler)

    def state(self, step: int) -> NamedState | None:
        """The state after ``step`` steps, for a checkpoint: rank 0's; None on the others. All ranks call it."""
        return self.share.state(step, self.model, self.optimizer, self.precision.scaler)

    def restore(self, state: NamedState) -> None:
        """Put a stored state into this freshly prepared training; raises `ValueError` when it does not fit."""
        self.share.restore(state, self.model, self.optimizer, self.precision.scaler)
