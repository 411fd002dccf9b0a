"""The two arms of ``benchmarks trainer``: our loop, and `transformers.Trainer`, on the same work.

Shared by both: initial weights, pre-collated batches in their order, micro-batches, AdamW
(foreach), schedule, clipping norm, attention backend, thread count. Ours runs
with its `StepMeter` on, as users run it. The Trainer runs without logging, evaluation,
checkpoints, progress bar and its NaN filter: everything that it lets one switch off is off.

The arms take turns step by step: at the end of each of the Trainer's steps our loop takes one.
So both see the same machine, whatever else runs on it, and neither is warmer than the other.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from bench_cases import Case
from bench_cases.collate import Batch
from harness.loop import LoopOptions, train
from harness.loss import IGNORE_INDEX
from harness.optimizer import learning_rate
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.settings import MAX_NORM, RunSettings
from instrument.watch.meter import Reading, StepMeter


@dataclass(frozen=True)
class Work:
    """What both arms do. ``batches`` are collated before the clock starts."""

    settings: RunSettings
    initial: nn.Module
    batches: tuple[Batch, ...]
    valid_vocab: int | None

    @property
    def case(self) -> Case:
        return self.settings.case

    def step(self, step: int) -> Batch:
        """The batch of step ``step`` (from 1), for `harness.loop`."""
        return self.batches[step - 1]

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer, Precision]:
        """The model at its initial weights, a fresh optimizer and the precision, as `harness.run.execute` makes them."""
        settings = self.settings
        precision = Precision(settings.config, torch.device("cpu"), attention=settings.attention, threads=settings.threads)
        model = precision.prepare(copy.deepcopy(self.initial).train())
        optimizer = precision.make_optimizer(lr=settings.lr, weight_decay=self.case.weight_decay, seed=settings.seed)
        return model, optimizer, precision


@dataclass
class Arm:
    """One arm: of every step its loss, its wall seconds and its processor seconds, and the final weights."""

    losses: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)


class Stopwatch:
    """Adds to an arm what has passed between `start` and `stop`."""

    def start(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def stop(self, arm: Arm) -> None:
        arm.cpu_s.append(time.process_time() - self._cpu_s)
        arm.wall_s.append(time.perf_counter() - self._wall_s)


def work_for(settings: RunSettings) -> Work:
    """Build model and batches of ``settings`` once, for all arms."""
    from bench_cases.models import build_model

    data = load_run_data(settings)
    model = build_model(model_request(settings, data))
    batches = make_batches(settings, data)
    return Work(
        settings,
        model,
        tuple(batches.step(step) for step in range(1, settings.max_steps + 1)),
        data.valid_vocab if settings.case.task.head != "classification" else None,
    )


def run_both(work: Work) -> tuple[Arm, Arm]:
    """(ours, the Trainer's), each over all steps from the same start."""
    gc.collect()
    ours, theirs, watch = Arm(), Arm(), Stopwatch()
    our_model, our_steps = _our_loop(work)

    def between_steps() -> None:
        watch.stop(theirs)
        watch.start()
        reading = next(our_steps)
        watch.stop(ours)
        ours.losses.append(reading.steps[-1].loss)
        watch.start()

    their_model, theirs.losses = _trainer(work, watch.start, between_steps)
    ours.weights, theirs.weights = ([p.detach() for p in model.parameters()] for model in (our_model, their_model))
    return ours, theirs


def _our_loop(work: Work) -> tuple[nn.Module, Iterator[Reading]]:
    """The model and `harness.loop.train` over it, a step at a time."""
    settings = work.settings
    model, optimizer, precision = work.start()
    meter = StepMeter(
        model,
        optimizer,
        precision.device,
        window=1,
        micro_batches=settings.batch_size // settings.micro_batch,
        warmup_steps=settings.warmup_steps,
    )
    options = LoopOptions(
        settings.max_steps, settings.warmup_steps, settings.micro_batch, settings.lr, MAX_NORM, work.valid_vocab
    )
    return model, train(work.case, model, optimizer, work, precision, meter, options)


def _trainer(work: Work, at_start: Callable[[], None], after_step: Callable[[], None]) -> tuple[nn.Module, list[float]]:
    """Train with `transformers.Trainer`; returns the model and the loss of every step."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    settings = work.settings
    model, optimizer, precision = work.start()
    schedule = LambdaLR(
        optimizer,
        lambda done: learning_rate(
            min(done + 1, settings.max_steps), peak=1.0, warmup_steps=settings.warmup_steps, max_steps=settings.max_steps
        ),
    )

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            at_start()

        def on_step_end(self, *_, **__) -> None:
            after_step()

    accumulation = settings.batch_size // settings.micro_batch
    wrapped = LossInside(work, model, precision, accumulation)
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            max_steps=settings.max_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=MAX_NORM,
            use_cpu=True,
            fp16=False,
            bf16=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            train_sampling_strategy="sequential",
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            seed=settings.seed,
        )
        trainer = Trainer(
            model=wrapped,
            args=arguments,
            train_dataset=_micro_batches(work),
            data_collator=lambda rows: rows[0],
            optimizers=(optimizer, schedule),
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    micro = torch.stack(wrapped.losses).double() / accumulation
    return model, micro.view(-1, accumulation).sum(1).tolist()


class LossInside(nn.Module):
    """Our model with the interface that the Trainer wants: a forward that returns the loss.

    The Trainer divides a micro-batch's loss by the number of micro-batches, so the loss is
    normalised by the whole step's targets over that number: the same gradients as our loop's.
    """

    accepts_loss_kwargs = False

    def __init__(self, work: Work, model: nn.Module, precision: Precision, accumulation: int) -> None:
        super().__init__()
        self.model = model
        self.losses: list[torch.Tensor] = []
        self._work, self._precision, self._accumulation = work, precision, accumulation

    def forward(self, input_ids, attention_mask, last_token, targets, n_targets):
        """A dict with the key ``loss``, as the Trainer reads it."""
        with self._precision.forward():
            logits = self.model(input_ids, attention_mask, last_token)
        loss = self._sum(logits, targets) / (n_targets / self._accumulation)
        self.losses.append(loss.detach())
        return {"loss": loss}

    def _sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """torch's own loss, which a user of the Trainer has: ours also measures the logits."""
        if self._work.case.task.loss == "bce_with_logits":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        rows = logits.flatten(0, -2)[:, : self._work.valid_vocab]
        return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _micro_batches(work: Work) -> list[dict[str, object]]:
    """The same micro-batches in the same order; an item of this data set is one of them."""
    return [
        {
            "input_ids": micro.input_ids,
            "attention_mask": micro.attention_mask,
            "last_token": micro.last_token,
            "targets": micro.targets,
            "n_targets": batch.n_targets,
        }
        for batch in work.batches
        for micro in batch.micro_batches(work.settings.micro_batch)
    ]
