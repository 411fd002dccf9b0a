"""The state of a sharded run as one process would have it: put together for a checkpoint, and taken apart again.

A tensor at a time goes through a rank's device, and only rank 0 keeps what it gets. Random states are every rank's own:
rank 0's have the names that one process uses, the others' begin with ``random/rank<n>/``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.parallel.team import Team
from instrument.replay.snapshot import NamedState

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
def put_together(mine: NamedState, sharded: Mapping[str, DTensor], team: Team) -> NamedState | None:
    """The whole state, on rank 0, from the slices that each rank has of it; None on the others. ``sharded``: the model's
    parameters. All ranks call it; raises `RanksDiffer` where they have other states or other single numbers, `ValueError`
    for a state that is neither a slice like its parameter's nor a single number."""
    parts = {name: part for name, part in mine.tensors.items() if not name.startswith(RANDOM)}
    alike = [(name, None if part.ndim else part.item()) for name, part in parts.items()], mine.scaler
    team.same("names and counters of the states", hashlib.sha256(repr(alike).encode()).hexdigest())
    tensors = {}
    for name, part in parts.items():
        team.moved()
        like = _parameter_of(name, sharded)
        if like is not None and _is_slice(name, part, like.to_local().shape):
            part = _whole(part, like)
        if team.ranks.is_first:
            tensors[name] = part.cpu()
    told = team.gather({name: state for name, state in mine.tensors.items() if name.startswith(RANDOM)})
    for rank, theirs in enumerate(told):
        tensors |= {f"{_random_of(rank)}{name.removeprefix(RANDOM)}": state for name, state in theirs.items()}
    return replace(mine, tensors=tensors) if team.ranks.is_first else None


@torch.no_grad()
def taken_apart(state: NamedState, sharded: Mapping[str, DTensor], rank: int) -> NamedState:
    """This rank's slices of a whole state, in host memory, and its random states; raises `ValueError` when it is not
    one of this model on so many ranks."""
    tensors = {}
    for name, value in state.tensors.items():
        if not name.startswith(RANDOM):
            like = _parameter_of(name, sharded)
            cut = like is not None and _is_slice(name, value, like.shape)
            tensors[name] = _slice(value, like) if cut else value
    own = {
        name.removeprefix(_random_of(rank)): value
        for name, value in state.tensors.items()
        if name.startswith(_random_of(rank)) and (rank or not name.startswith(f"{RANDOM}rank"))
    }
    if not own:
        raise ValueError(f"the stored state has no random states of rank {rank}")
    return replace(state, tensors=tensors | {RANDOM + name: value for name, value in own.items()})


def _whole(part: torch.Tensor, like: DTensor) -> torch.Tensor:
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _slice(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """Without talking to another rank."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local().cpu()


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
