"""FSDP2 (`fully_shard`): every rank keeps a slice of each parameter, gradient and optimizer state.

The optimizer sees the slices as plain tensors, so that every implementation that works element by element is the same as on
whole tensors; statistics of gradients are combined over the ranks, by one exchange without a host sync, before anything is
decided by them. What needs a whole tensor is refused, with the reason.

A checkpoint has whole tensors: they are gathered one at a time through the ranks' devices, and only rank 0 keeps them. Random
states are every rank's own: rank 0's have the names that one process uses, the others' begin with ``random/rank<n>/``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.parallel.context import DistributedContext
from harness.parallel.strategy import ParallelStrategy
from harness.precision import Precision, Unsupported
from instrument.replay.snapshot import NamedState, Snapshot
from kernels import TensorStats
from kernels.multi_tensor_stats.reference import ABSMAX, FIRST_NONFINITE, FOUND_INF_F32, NAN, NORM, NOT_COUNTED, NUMEL, SUMSQ

NO_PLACE = torch.iinfo(torch.int64).max


def over_ranks(mine: TensorStats) -> TensorStats:
    """The statistics of the whole tensors from those of this rank's slices, the same on every rank."""
    world = dist.get_world_size()
    gathered = torch.empty((world, *mine.table.shape), dtype=torch.int64, device=mine.table.device)
    dist.all_gather(list(gathered.unbind()), mine.table.contiguous())
    table = gathered[0].clone()
    floats, all_floats = table.view(torch.float64), gathered.view(torch.float64)
    floats[:, SUMSQ] = all_floats[..., SUMSQ].sum(0)
    floats[:, NORM] = floats[:, SUMSQ].sqrt()
    floats[:, ABSMAX] = all_floats[..., ABSMAX].amax(0)
    counts = slice(NAN, NUMEL + 1)  # NaN, infinities, zeros, what fp16 would flush, elements
    table[:, counts] = torch.where(table[:, counts] == NOT_COUNTED, NOT_COUNTED, gathered[..., counts].sum(0))
    firsts = gathered[:, -1, FIRST_NONFINITE]
    first = torch.where(firsts < 0, NO_PLACE, firsts).amin()
    table[-1, FIRST_NONFINITE] = torch.where(first == NO_PLACE, -1, first)
    found = gathered.view(torch.float32)[:, -1, FOUND_INF_F32]
    table.view(torch.float32)[-1, FOUND_INF_F32] = found.amax()
    return TensorStats(table)


RANDOM = "random/"


class SlicedModel(nn.Module):
    """``model`` with this rank's ``slices`` in place of its parameters, by their names: what a `Snapshot` looks at."""

    def __init__(self, model: nn.Module, slices: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.model, self._slices = model, slices

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._slices.items()

    def named_buffers(self, *args, **kwargs) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_buffers(*args, **kwargs)


@torch.no_grad()
def gather_full_state(mine: NamedState, sharded: Mapping[str, DTensor], context: DistributedContext) -> NamedState | None:
    """The whole state, on rank 0, from the slices that each rank has of it; None on the others. ``sharded``: the model's
    parameters. All ranks call it; raises `RanksDiffer` where they have other states or other single numbers, `ValueError`
    for a state that is neither a slice like its parameter's nor a single number."""
    parts = {name: part for name, part in mine.tensors.items() if not name.startswith(RANDOM)}
    alike = [(name, None if part.ndim else part.item()) for name, part in parts.items()], mine.scaler
    context.same("names and counters of the states", hashlib.sha256(repr(alike).encode()).hexdigest())
    tensors = {}
    for name, part in parts.items():
        context.progressed()
        like = _parameter_of(name, sharded)
        if like is not None and _is_slice(name, part, like.to_local().shape):
            part = _whole(part, like)
        if context.ranks.is_first:
            tensors[name] = part.cpu()
    states = context.gather({name: state for name, state in mine.tensors.items() if name.startswith(RANDOM)})
    for rank, theirs in enumerate(states):
        tensors |= {f"{_random_of(rank)}{name.removeprefix(RANDOM)}": state for name, state in theirs.items()}
    return replace(mine, tensors=tensors) if context.ranks.is_first else None


@torch.no_grad()
def shard_state(state: NamedState, sharded: Mapping[str, DTensor], rank: int) -> NamedState:
    """This rank's slices of a whole state, in host memory, and its random states; raises `ValueError` when it is not
    one of this model on so many ranks."""
    tensors = {}
    for name, value in state.tensors.items():
        if not name.startswith(RANDOM):
            like = _parameter_of(name, sharded)
            if like is not None and _is_slice(name, value, like.shape):  # cut without talking to another rank
                value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local().cpu()
            tensors[name] = value
    prefix, others = _random_of(rank), f"{RANDOM}rank" if rank == 0 else None
    own = [name for name in state.tensors if name.startswith(prefix) and not (others and name.startswith(others))]
    if not own:
        raise ValueError(f"the stored state has no random states of rank {rank}")
    return replace(state, tensors=tensors | {RANDOM + name.removeprefix(prefix): state.tensors[name] for name in own})


def _whole(part: torch.Tensor, like: DTensor) -> torch.Tensor:
    part, mesh = part.to(like.device), like.device_mesh
    return DTensor.from_local(part, mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def _parameter_of(name: str, sharded: Mapping[str, DTensor]) -> DTensor | None:
    """The parameter that ``model/NAME`` or ``optimizer/NAME/KEY`` belongs to; None for a buffer."""
    kind, _, rest = name.partition("/")
    return sharded.get(rest if kind == "model" else rest.rpartition("/")[0])


def _is_slice(name: str, value: torch.Tensor, expected: torch.Size) -> bool:
    """Whether it has an element for each of its parameter's, or else is one number, the same on all ranks."""
    if value.ndim and value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)} where its parameter has {tuple(expected)}")
    return value.ndim > 0


def _random_of(rank: int) -> str:
    return f"{RANDOM}rank{rank}/" if rank else RANDOM


NEEDS_WHOLE = {"8bit": "8-bit states are quantised in blocks of a whole tensor, and slices would have other blocks"}


class FsdpStrategy(ParallelStrategy):
    """Trained through a sharded model: snapshots in memory and replays, which need whole states, are not made."""

    keeps_state = False
    deals_evaluations = False
    """Every forward pass gathers weights from all ranks: all run all batches."""

    def __init__(self, context: DistributedContext, model: nn.Module, slices: Sequence[nn.Parameter]) -> None:
        super().__init__(context)
        self._model = model
        self._sharded = dict(model.named_parameters())
        self._slices = dict(zip(self._sharded, slices, strict=True))
        self._sliced = SlicedModel(model, self._slices)

    def synchronized(self, wanted: bool) -> AbstractContextManager:
        self._model.set_requires_gradient_sync(wanted)
        return nullcontext()

    def sum_gradients(self) -> None:
        """FSDP has summed them; hand each rank's slices to the optimizer's tensors."""
        for parameter, part in zip(self._sharded.values(), self._slices.values(), strict=True):
            part.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def named_parameters(self, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        return list(self._slices.items())

    def seed(self, seed: int) -> int:
        """Slices are rounded stochastically by numbers of their own."""
        return seed + self.context.ranks.rank

    def weights_sha256(self, model: nn.Module) -> str:
        _reshard(model)
        return super().weights_sha256(model)

    def whole_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        _reshard(model)
        return super().whole_weights(model)

    def state(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> NamedState | None:
        return gather_full_state(Snapshot(step, self._sliced, optimizer, scaler).named(), self._sharded, self.context)

    def restore(
        self, state: NamedState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """This rank's slices of it."""
        mine = shard_state(state, self._sharded, self.context.ranks.rank)
        Snapshot.from_named(mine, self._sliced, optimizer, scaler).restore()


def fsdp_strategy(context: DistributedContext, model: nn.Module, precision: Precision) -> FsdpStrategy:
    """Shard a prepared model in place, its layers one by one, and give ``precision`` the slices to measure, clip and
    update. Raises `Unsupported` for a configuration that needs whole tensors."""

    def refuse(why: str) -> None:
        raise Unsupported(f"under --parallel fsdp: {why}; use --parallel ddp")

    config = precision.config
    if config.optimizer in NEEDS_WHOLE:
        refuse(NEEDS_WHOLE[config.optimizer])
    if config.clip == "fp16":
        refuse("the norm of all gradients is computed in fp16, and no rank has all of them")
    if not all(parameter.requires_grad for parameter in model.parameters()):
        refuse("some parameters are frozen, which is not supported")
    mesh = init_device_mesh(precision.device.type, (context.ranks.world,))
    for module in (*_layers(model), model):
        fully_shard(module, mesh=mesh)
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)  # summed: the loss is divided by the whole step's targets
        module.set_force_sum_reduction_for_comms(True)
    slices = [nn.Parameter(parameter.detach().to_local(), requires_grad=False) for parameter in model.parameters()]
    precision.parameters, precision.over_ranks = slices, over_ranks
    if precision.scaler is not None:
        precision.scaler.measured, precision.scaler.over_ranks = slices, over_ranks
    return FsdpStrategy(context, model, slices)


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard(model: nn.Module) -> None:
    """An evaluation leaves the outermost weights gathered."""
    for module in _fsdp_modules(model):
        module.reshard()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of outermost `ModuleList`s."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{outer}.") for outer in lists):
            yield from model.get_submodule(name)
