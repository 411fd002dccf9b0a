"""How the ranks of a run share a training step: each runs its micro-batches, then the gradients are summed.

The loss is divided by the targets of the whole step on every rank, so gradients are summed over ranks and not averaged: a rank
with more targets counts for more, as a micro-batch does in one process. The sum is made in the gradients' own dtype, as the sum
over micro-batches is. Here: one process, and `DistributedDataParallel`; sharding is in `harness.parallel.fsdp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench_cases.models import weights_sha256, whole_parameters
from harness.optimizer import state_dtypes, zeros_and_total
from harness.parallel.context import SINGLE_PROCESS, DistributedContext
from instrument.replay.snapshot import NamedState, Snapshot

Micro = TypeVar("Micro")


class ParallelStrategy:
    """One process runs the whole step; and what the other strategies have in common."""

    def __init__(self, context: DistributedContext = SINGLE_PROCESS) -> None:
        self.context = context

    keeps_state = True
    """Whether each rank has all of the weights and states: for snapshots in memory and replays."""
    deals_evaluations = True

    def trained(self, forward: torch.nn.Module) -> torch.nn.Module:
        """What the loop calls in place of the model."""
        return forward

    def named_parameters(self, model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
        """What this rank's optimizer updates, by the parameters' names."""
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def seed(self, seed: int) -> int:
        """Of the optimizer's random numbers: the same on ranks that update the same weights."""
        return seed

    def weights_sha256(self, model: torch.nn.Module) -> str:
        """As `bench_cases.models.weights_sha256`; all ranks call it."""
        return weights_sha256(model)

    def whole_weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """`bench_cases.models.whole_parameters` on rank 0, empty on the others; all ranks call it."""
        weights = {}
        for name, value in whole_parameters(model):
            if self.context.ranks.is_first:
                weights[name] = value
        return weights

    def optimizer_facts(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """For the record's ``flags``, of slices those of all ranks together; all ranks call it."""
        mine = state_dtypes(optimizer), *zeros_and_total(optimizer)
        ranks = [mine] if self.keeps_state else self.context.gather(mine)
        dtypes = {name: sum(states.get(name, 0) for states, *_ in ranks) for states, *_ in ranks for name in states}
        zeros, total = (sum(rank[which] for rank in ranks) for which in (1, 2))
        return {"optimizer_states": dtypes, "exp_avg_sq_zero_frac": zeros / total if total else None}

    def state(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> NamedState | None:
        """The whole state after ``step`` steps, for rank 0 to store; None on the others. All ranks call it."""
        return Snapshot(step, model, optimizer, scaler).named() if self.context.ranks.is_first else None

    def restore(
        self, state: NamedState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Put a stored state into freshly prepared objects; raises `ValueError` when it does not fit."""
        Snapshot.from_named(state, model, optimizer, scaler).restore()

    def count(self, micro_batches: int) -> int:
        """How many of a step's micro-batches this rank runs."""
        return micro_batches // self.context.ranks.world

    def first(self, micro_batches: int) -> int:
        """The place of its first one in the step: they are dealt in blocks, rank 0 the first."""
        return self.context.ranks.rank * self.count(micro_batches)

    def of(self, micro_batches: Sequence[Micro]) -> Iterator[Micro]:
        """The micro-batches of a step that this rank runs. Gradients are summed over ranks in the last backward pass."""
        first, count = self.first(len(micro_batches)), self.count(len(micro_batches))
        for place, micro in enumerate(micro_batches[first : first + count], start=1):
            self.context.progressed()
            with self.synchronized(place == count):
                yield micro

    def synchronized(self, wanted: bool) -> AbstractContextManager:
        """Around a micro-batch: whether its backward pass sums the gradients over the ranks."""
        return nullcontext()

    def sum_gradients(self) -> None:
        """Called after the last backward pass: from now on every rank's gradients are the step's."""


NO_PARALLELISM = ParallelStrategy()


class DdpStrategy(ParallelStrategy):
    """Trained through `DistributedDataParallel`, which sums while the last backward pass still runs."""

    def __init__(self, context: DistributedContext, wrapped: DistributedDataParallel) -> None:
        super().__init__(context)
        self.wrapped = wrapped
        wrapped.register_comm_hook(None, _summed)

    def trained(self, forward: torch.nn.Module) -> torch.nn.Module:
        return self.wrapped

    def synchronized(self, wanted: bool) -> AbstractContextManager:
        return nullcontext() if wanted else self.wrapped.no_sync()


class SummedGradients(ParallelStrategy):
    """Trained on the bare model, for replays: the sum is one op, which a recorder sees."""

    def __init__(self, context: DistributedContext, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(context)
        self._parameters = parameters

    @torch.no_grad()
    def sum_gradients(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch.ops.ddb.sum_over_ranks_(gradients)


def _summed(state, bucket):
    """DDP's own hook divides by the number of ranks; this one does not. (DDP refuses annotations that are text.)"""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


@torch.library.custom_op("ddb::sum_over_ranks_", mutates_args=("gradients",))
def _sum_over_ranks(gradients: list[torch.Tensor]) -> None:
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(flat)
        for gradient, part in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
            gradient.copy_(part.view_as(gradient))


def ddp_strategy(
    context: DistributedContext, forward: torch.nn.Module, device: torch.device, *, some_unused: bool
) -> DdpStrategy:
    """``forward`` under DDP. ``some_unused``: not every parameter takes part in the loss, which DDP has to look
    for in each step. Buffers stay every rank's own: they are made alike and no model here changes them."""
    ids = [device.index or torch.cuda.current_device()] if device.type == "cuda" else None
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # by torch's version
    own_buffers = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(forward, device_ids=ids, find_unused_parameters=some_unused, **own_buffers)
    return DdpStrategy(context, wrapped)


def takes_part(model: torch.nn.Module, logits: torch.Tensor) -> set[str]:
    """Names of the trained parameters that ``logits`` were made of."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    return {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
