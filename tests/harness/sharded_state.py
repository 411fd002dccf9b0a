"""Under torchrun: a small sharded model is trained, its state stored, read and put into another; asserts on every rank.
Arguments: an empty folder.

Dimensions that no number of ranks divides, one of 1 (so that a rank has a slice without elements), tied weights, a buffer.
"""

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from harness.optimizer import adamw_for
from harness.parallel.context import RanksDiffer
from harness.parallel.fsdp import fsdp_strategy, shard_state
from harness.parallel.process_group import joined
from harness.parallel.ranks import Ranks, end_process
from harness.run import checkpoints
from harness.run.checkpoints import Progress

CPU = torch.device("cpu")
NOTHING = Progress(
    init_sha256="", data_sha256="", environment={}, instrument="off", log_bytes={}, timings_s={}, resumed_after=[], taps=None
)


class Small(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 3)])
        self.register_buffer("shift", torch.arange(3.0) + seed)

    def forward(self, ids):
        hidden = self.embedding(ids) + self.shift.to(self.embedding.weight.dtype)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden @ self.embedding.weight.T


def sharded(context, implementation, dtype, seed):
    """A sharded model, its strategy and its optimizer."""
    model = Small(seed).to(dtype)
    precision = SimpleNamespace(config=SimpleNamespace(optimizer=implementation, clip="fp32"), device=CPU, scaler=None)
    strategy = fsdp_strategy(context, model, precision)
    return (
        model,
        strategy,
        adamw_for(implementation, precision.parameters, lr=1e-2, eps=1e-8, weight_decay=0.1, seed=strategy.seed(seed)),
    )


def train(model, strategy, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randint(0, 7, (4,))).float().square().sum()
        loss.backward()
        strategy.sum_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def mine(strategy, optimizer):
    """This rank's part of everything, by name."""
    held = {f"model/{name}": part.detach() for name, part in strategy.named_parameters(None)}
    for name, part in strategy.named_parameters(None):
        held |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[part].items()}
    if hasattr(optimizer, "_generator"):
        held["random"] = optimizer._generator.get_state()
    return {name: value.clone() for name, value in held.items()}


def same(one, two):
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


def stored_and_put_back(context, folder, implementation, dtype):
    model, strategy, optimizer = sharded(context, implementation, dtype, seed=1)
    train(model, strategy, optimizer, range(1, 4))
    state, before = strategy.state(3, model, optimizer, None), mine(strategy, optimizer)
    assert (state is not None) == context.ranks.is_first
    if state is not None:
        checkpoints.write_checkpoint(folder, implementation, state, NOTHING)
    gathered = context.gather({name: value for name, value in before.items() if value.ndim and name != "random"})
    assert [rank for rank, parts in enumerate(gathered) if not parts["model/layers.1.weight"].numel()] == [1]
    stored, _ = checkpoints.read_checkpoint(folder, implementation, 3)
    expected = {name: torch.cat([parts[name] for parts in gathered]) for name in before if name in gathered[0]}
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    expected |= {f"model/{name}": p.detach().full_tensor() for name, p in model.named_parameters()}  # FSDP's own word
    expected |= {name: value for name, value in before.items() if value.ndim == 0} | {"model/shift": model.shift}
    assert same(expected, {n: t for n, t in stored.tensors.items() if not n.startswith("random/")})
    assert [name for name in stored.tensors if name.startswith("random/rank1/")] and stored.devices.keys() == {
        name for name in expected if name.startswith("optimizer/")
    }
    generators = [name for name in stored.tensors if "optimizer/0" in name]
    assert len(generators) == (2 if implementation == "stochastic_rounding" else 0)
    if generators:
        assert not torch.equal(*(stored.tensors[name] for name in generators))  # slices are rounded by other numbers

    again = sharded(context, implementation, dtype, seed=2)
    train(*again, range(1, 2))  # as if something had been done with it
    again[1].restore(stored, again[0], again[2], None)
    assert same(mine(*again[1:]), before) and torch.equal(again[0].shift, model.shift)
    train(model, strategy, optimizer, range(4, 6))
    train(*again, range(4, 6))
    assert same(mine(*again[1:]), mine(strategy, optimizer)) and not same(mine(strategy, optimizer), before)
    return stored, strategy


def refused(words, call, *arguments):
    try:
        call(*arguments)
    except (ValueError, RanksDiffer) as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def what_does_not_fit(context, stored, strategy):
    """Another model, another number of ranks, and a state that can be no slice."""
    parts, rank = dict(strategy._sharded), context.ranks.rank
    other = copy.copy(stored)
    other.tensors["model/layers.0.bias"] = torch.zeros(4)
    refused("model/layers.0.bias has shape (4,) where its parameter has (5,)", shard_state, other, parts, rank)
    other.tensors.pop("model/layers.0.bias")
    refused("no random states of rank 2", shard_state, other, parts, 2)
    model, fresh, optimizer = sharded(context, "foreach", torch.float32, seed=3)
    refused("the stored state is of another model: layers.0.bias differs", fresh.restore, other, model, optimizer, None)
    train(model, fresh, optimizer, range(1, 2))
    some = next(iter(optimizer.state.values()))
    some["step"] += rank
    refused("of rank 1 are not those of rank 0", fresh.state, 1, model, optimizer, None)
    some["step"] -= rank
    some["rows"] = torch.zeros(2)
    refused("has shape (2,) where its parameter has", fresh.state, 1, model, optimizer, None)


if __name__ == "__main__":
    ranks = Ranks.from_environment()
    with joined(ranks, CPU, 60.0) as context:
        for implementation, dtype in (
            ("stochastic_rounding", torch.bfloat16),
            ("fp32_states", torch.float16),
            ("fused", torch.float32),
            ("foreach", torch.float32),
        ):
            folder = Path(sys.argv[1]) / implementation
            if context.ranks.is_first:
                folder.mkdir()
            stored, strategy = stored_and_put_back(context, folder, implementation, dtype)
        what_does_not_fit(context, stored, strategy)
        context.gather(None)
    os.write(1, b"all is well\n")
    end_process(0)
