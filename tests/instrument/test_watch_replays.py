"""What a watch and its replays leave behind, which is nothing; and when a replay says that it failed."""

import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from instrument import Watch
from tests.instrument.awkward import Net, batch, sgd, square_root_of_zero, state_of, watched

# -- the run stays as it is -------------------------------------------------------------------


def test_a_replay_leaves_gradients_buffers_and_every_random_state_alone():
    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            out = super().forward(x + random.random() + np.random.rand() + torch.rand(()))
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)  # another tensor every time
            return out + self.mean

    def run(with_watch):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Noisy()
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)

        def step(number, watch):
            loss = model(batch(number)).square().mean()
            scaler.scale(loss + square_root_of_zero(model.b.weight) if number == 4 else loss).backward()
            if number % 2 == 0:  # every second step updates: gradients live from step to step
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

        if with_watch:
            watch = watched(step, model, optimizer, range(1, 9), scaler=scaler, snapshot_every=5, log_every=5)
            assert watch.events[0].detail["first_nonfinite"]["op"] == "aten.div"
        else:
            torch.manual_seed(1)
            for number in range(1, 9):
                step(number, None)
        return state_of(model, optimizer)

    assert all(map(torch.equal, run(False), run(True)))


def test_copies_and_pickles_of_a_watched_model_are_free_of_the_watch():
    model = Net()
    scaler = torch.amp.GradScaler("cpu")
    watch = Watch(model, sgd(model), scaler=scaler, every=1)
    average = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    assert copy.deepcopy(scaler).unscale_.__self__ is not scaler
    with watch.step(1):
        average(batch(1)).sum().backward()
    assert watch.headroom() == []


def test_closing_in_any_order_leaves_nothing_behind():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.ones(3, 4))

        def forward(self):
            return self.prompt

    model = nn.ModuleDict({"prompt": Prompt(), "head": nn.Linear(4, 2)})
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    first, second = (Watch(model, optimizer, scaler=scaler, every=1) for _ in range(2))
    with first.step(1), second.step(1):
        scaler.scale(model["head"](model["prompt"]()).sum()).backward()
    first.close()
    with second.step(2):
        scaler.scale(model["head"](model["prompt"]()).sum() / 0.0).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [event.step for event in second.events] == [2] and second.first_nonfinite is None
    second.close()
    assert "unscale_" not in vars(scaler) and not model["prompt"].prompt._backward_hooks
    assert not any(m._forward_hooks for m in model.modules()) and not optimizer._optimizer_step_pre_hooks


# -- replays are honest -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"log_every": 20, "snapshot_every": 2}, {"log_every": 3, "snapshot_every": 2}, {"log_every": 7, "snapshot_every": 50}],
)
@pytest.mark.parametrize("numbers", [range(1, 21), range(0, 200, 10), [0, 1, 2, 3, 7, 0, 1, 2, 3, 4]])
def test_a_failure_is_replayed_from_before_it_whatever_the_cadences_and_the_numbers(options, numbers):
    model = Net()
    optimizer = sgd(model)
    failing = list(numbers)[4]
    run = []

    def step(number, watch):
        run.append(number)
        loss = model(batch(number)).square().mean()
        watch.loss(loss / 0.0 if number == failing else loss)
        (loss / 0.0 if number == failing else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = watched(step, model, optimizer, numbers, **options).first_nonfinite
    assert (found.step, found.phase, found.op, found.replay["matched"]) == (failing, "loss", "aten.div", True)
    assert set(run) == set(numbers)  # no step is run that never was


def test_a_replay_that_fails_in_another_way_does_not_match_and_names_nothing():
    model = Net()
    optimizer = sgd(model)
    runs = {"of step 3": 0}

    def step(number, watch):
        loss = model(batch(number)).square().mean()
        if number == 3:
            runs["of step 3"] += 1
            loss = loss / 0.0 if runs["of step 3"] == 1 else model.b(batch(1) @ torch.full((4, 8), math.nan)).mean()
        watch.loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = watched(step, model, optimizer).first_nonfinite
    assert (found.step, found.phase, found.op, found.kind) == (3, "loss", None, "inf")
    assert found.replay == {"matched": False, "from_step": 0}


def test_a_step_function_that_raises_does_not_end_the_run():
    model = Net()
    optimizer = sgd(model)
    runs = {"of step 3": 0}

    def step(number, watch):
        loss = model(batch(number)).square().mean()
        if number == 3:
            runs["of step 3"] += 1
            if runs["of step 3"] > 1:
                raise StopIteration("the loader is exhausted")
            loss = loss / 0.0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = watched(step, model, optimizer).first_nonfinite
    assert found.step == 3 and found.replay["error"] == "StopIteration: the loader is exhausted"


# -- used wrongly -----------------------------------------------------------------------------


def test_wrong_use_gets_a_clear_sentence_and_a_raised_step_none_of_the_blame():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Watch(Net().requires_grad_(False))
    model = Net()
    watch = Watch(model, sgd(model), every=1)
    with pytest.raises(RuntimeError, match="outside of a step"):
        watch.loss(torch.ones(()))
    with watch.step(1), pytest.raises(RuntimeError, match="inside another step"), watch.step(2):
        pass
    with pytest.raises(KeyError), watch.step(2):
        model(batch(1) * math.nan)
        raise KeyError
    with watch.step(3):
        model(batch(1)).sum().backward()
    assert watch.first_nonfinite is None
