"""Snapshots: what is put back is what was there, bit for bit, in every optimizer."""

import pytest
import torch
from torch import nn

from harness.optimizer import adamw_for
from instrument.replay.snapshot import Snapshot

IMPLEMENTATIONS = ("foreach", "fused", "fp32_states", "stochastic_rounding", "8bit")


def training(implementation, scaler=None):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if implementation == "stochastic_rounding" else torch.float32
    model = nn.Sequential(nn.Linear(80, 80), nn.Dropout(0.3), nn.Linear(80, 8)).to(dtype)
    optimizer = adamw_for(implementation, list(model.parameters()), lr=1e-2, eps=1e-8, weight_decay=0.1, seed=3)

    def step(number):
        x = torch.full((4, 80), float(number), dtype=dtype)
        loss = model(x).float().square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.5

    return model, optimizer, step


def state(model, optimizer):
    found = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        found += [v.clone() for v in optimizer.state.get(parameter, {}).values() if torch.is_tensor(v)]
    return found, [group["lr"] for group in optimizer.param_groups], len(optimizer.state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("at", [0, 2])
def test_a_restored_run_goes_on_as_the_first_time(implementation, at):
    model, optimizer, step = training(implementation)
    for number in range(1, at + 1):
        step(number)
    snapshot = Snapshot(at, model, optimizer)
    before = state(model, optimizer)
    for number in range(at + 1, at + 4):
        step(number)
    after = state(model, optimizer)
    snapshot.restore()
    restored = state(model, optimizer)
    assert restored[1:] == before[1:] and all(map(torch.equal, restored[0], before[0]))
    for number in range(at + 1, at + 4):
        step(number)
    again = state(model, optimizer)
    assert again[1:] == after[1:] and all(map(torch.equal, again[0], after[0]))


def test_the_loss_scaler_comes_back_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    model, optimizer, step = training("foreach", scaler)
    step(1)
    snapshot = Snapshot(1, model, optimizer, scaler)
    step(2)
    grown = scaler.get_scale()
    step(3)
    snapshot.restore()
    assert scaler.get_scale() == 16.0 and grown == 32.0
    step(2)
    assert scaler.get_scale() == grown


def test_a_scaler_that_has_not_been_used_stays_so():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1)
    model, optimizer, step = training("foreach", scaler)
    snapshot = Snapshot(0, model, optimizer, scaler)
    step(1)
    assert scaler.get_scale() == 32.0
    snapshot.restore()
    assert scaler.get_scale() == 16.0


def test_bytes_are_counted():
    model, optimizer, step = training("foreach")
    weights = sum(p.nbytes for p in model.parameters())
    assert Snapshot(0, model, optimizer).nbytes == weights
    step(1)
    assert Snapshot(1, model, optimizer).nbytes == 3 * weights + 4 * 4  # two states, and a step counter each
