"""FSDP2 (`fully_shard`): every rank keeps a slice of each parameter, gradient and optimizer state.

The optimizer sees the slices as plain tensors, so that every implementation that works element by element is the
same as on whole tensors; statistics of gradients are put together over the ranks before anything is decided by them.
What needs a whole tensor is refused, with the reason; a checkpoint has whole ones (`whole_state`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from harness.parallel.share import Micro, Share
from harness.parallel.stats_of_slices import over_ranks
from harness.parallel.team import Team
from harness.parallel.whole_state import SlicedModel, put_together, taken_apart
from harness.precision import Precision, Unsupported
from instrument.replay.snapshot import NamedState, Snapshot

NEEDS_WHOLE = {"8bit": "8-bit states are quantised in blocks of a whole tensor, and slices would have other blocks"}


class FsdpShare(Share):
    """Trained through a sharded model: snapshots in memory and replays, which need whole states, are not made."""

    keeps_state = False
    deals_evaluations = False
    """Every forward pass gathers weights from all ranks: all run all batches."""

    def __init__(self, team: Team, model: nn.Module, slices: Sequence[nn.Parameter]) -> None:
        super().__init__(team)
        self._model = model
        self._sharded = dict(model.named_parameters())
        self._slices = dict(zip(self._sharded, slices, strict=True))
        self._sliced = SlicedModel(model, self._slices)

    def of(self, micro_batches: Sequence[Micro]) -> Iterator[Micro]:
        own = self._own(micro_batches)
        for micro in own:
            self.team.moved()
            self._model.set_requires_gradient_sync(micro is own[-1])
            yield micro

    def sum_gradients(self) -> None:
        """FSDP has summed them; hand each rank's slices to the optimizer's tensors."""
        for parameter, part in zip(self._sharded.values(), self._slices.values(), strict=True):
            part.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def named_parameters(self, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        return list(self._slices.items())

    def seed(self, seed: int) -> int:
        """Slices are rounded stochastically by numbers of their own."""
        return seed + self.team.ranks.rank

    def weights_sha256(self, model: nn.Module) -> str:
        """That of the whole weights, gathered one by one."""
        for module in _fsdp_modules(model):
            module.reshard()  # an evaluation leaves the outermost weights gathered
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            value = parameter.detach().full_tensor().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def state(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> NamedState | None:
        return put_together(Snapshot(step, self._sliced, optimizer, scaler).named(), self._sharded, self.team)

    def restore(
        self, state: NamedState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """This rank's slices of it."""
        mine = taken_apart(state, self._sharded, self.team.ranks.rank)
        Snapshot.from_named(mine, self._sliced, optimizer, scaler).restore()

    def optimizer_facts(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """Of all ranks' slices together."""
        facts = [super().optimizer_facts(optimizer)["optimizer_states"]]
        squares = [state["exp_avg_sq"] for state in optimizer.state.values() if "exp_avg_sq" in state]
        counts = sum(int((s == 0).sum()) for s in squares), sum(s.numel() for s in squares)
        told = self.team.gather((facts[0], counts))
        dtypes = {name: sum(states.get(name, 0) for states, _ in told) for states, _ in told for name in states}
        zeros, total = (sum(pair[which] for _, pair in told) for which in (0, 1))
        return {"optimizer_states": dtypes, "exp_avg_sq_zero_frac": zeros / total if total else None}


def fsdp_share(team: Team, model: nn.Module, precision: Precision) -> FsdpShare:
    """Shard a prepared model in place, its layers one by one, and give ``precision`` the slices to measure, clip and
    update. Raises `Unsupported` for a configuration that needs whole tensors."""
    config = precision.config
    if config.optimizer in NEEDS_WHOLE:
        raise Unsupported(f"under --parallel fsdp: {NEEDS_WHOLE[config.optimizer]}; use --parallel ddp")
    if config.clip == "fp16":
        raise Unsupported(
            "under --parallel fsdp: the norm of all gradients is computed in fp16, and no rank has all of "
            "them; use --parallel ddp"
        )
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise Unsupported("under --parallel fsdp: some parameters are frozen, which is not supported; use --parallel ddp")
    mesh = init_device_mesh(precision.device.type, (team.ranks.world,))
    for module in (*_layers(model), model):
        fully_shard(module, mesh=mesh)
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)  # summed: the loss is divided by the whole step's targets
        module.set_force_sum_reduction_for_comms(True)
    slices = [nn.Parameter(parameter.detach().to_local(), requires_grad=False) for parameter in model.parameters()]
    precision.parameters, precision.over_ranks = slices, over_ranks
    if precision.scaler is not None:
        precision.scaler.measured, precision.scaler.over_ranks = slices, over_ranks
    return FsdpShare(team, model, slices)


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of outermost `ModuleList`s."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{outer}.") for outer in lists):
            yield from model.get_submodule(name)
