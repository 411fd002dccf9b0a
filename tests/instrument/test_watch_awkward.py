"""The watch on awkward models and in awkward loops, where the truth is planted; it leaves nothing, and a replay says when it
failed.
"""

import copy
import io
import math
import random
from contextlib import nullcontext

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from instrument import Watch
from instrument.hooks import blocks
from instrument.results.schemas import FirstNonfinite


class Net(nn.Module):
    """Defined in another order than it runs in."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)  # called twice: before the fault and after it
        self.head, self.b, self.a = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x):
        x = self.drop(torch.tanh(self.a(x)))
        return self.head(self.drop(torch.tanh(self.b(x))))


def batch(step):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def watched(run_step, model, optimizer, steps=range(1, 6), replay=True, **options):
    """Run ``run_step(step, watch)`` under a watch and close it."""
    torch.manual_seed(1)
    watch = Watch(model, optimizer, every=1, replay=(lambda step: run_step(step, watch)) if replay else None, **options)
    for step in steps:
        with watch.step(step):
            run_step(step, watch)
    watch.read()
    watch.close()
    return watch


def place(watch):
    found = watch.first_nonfinite
    return None if found is None else (found.step, found.phase, found.module)


def square_root_of_zero(parameter):
    """Zero, with a gradient of 0 * inf."""
    return (parameter.sum() * 0).abs().sqrt()


def state_of(model, optimizer):
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return [t.clone() for t in (*model.parameters(), *model.buffers(), *states)]


# -- who is named -----------------------------------------------------------------------------


def test_the_counters_go_by_the_order_of_execution_not_of_definition():
    model = Net()
    optimizer = sgd(model)

    def step(number, watch):
        if number == 3:
            with torch.no_grad():
                model.b.weight[0, 0] = math.nan
        model(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert place(watched(step, model, optimizer, replay=False)) == (3, "forward", "b")


@pytest.mark.parametrize("replay", [True, False])
def test_a_loop_that_calls_the_parts_of_its_model_has_a_backward_phase(replay):
    model = Net()
    optimizer = sgd(model)

    def step(number, watch):
        loss = model.head(model.b(model.a(batch(number)))).square().mean()
        (loss + square_root_of_zero(model.b.weight) if number == 3 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = watched(step, model, optimizer, replay=replay).first_nonfinite
    assert (found.step, found.phase, found.phase_surfaced) == (3, "backward", "backward")


@pytest.mark.parametrize("replay", [True, False])
def test_a_loop_without_an_optimizer_is_watched(replay):
    model = Net()

    def step(number, watch):
        loss = model(batch(number)).square().mean()
        (loss + square_root_of_zero(model.b.weight) if number == 3 else loss).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None

    assert place(watched(step, model, None, replay=replay))[:2] == (3, "backward")


def test_parameters_that_another_optimizer_spoils_are_found_in_that_step():
    model = Net()
    first, second = sgd(model.a), torch.optim.SGD([*model.b.parameters(), *model.head.parameters()], lr=0.1)

    def step(number, watch):
        model(batch(number)).square().mean().backward()
        first.step()
        second.param_groups[0]["lr"] = math.inf if number == 3 else 0.1
        second.step()
        model.zero_grad()

    assert place(watched(step, model, first, replay=False))[:2] == (3, "optimizer")


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.reentrant, self.fault = reentrant, None

    def forward(self, x):
        def body(x):
            x = self.inner(x)
            if self.fault == "forward":
                return x * math.inf
            return x + (x * 0).sum().abs().sqrt() if self.fault == "backward" else x

        return self.last(checkpoint(body, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_an_op_in_a_checkpoint_belongs_to_the_module_that_wrote_it(reentrant, fault):
    model = Checkpointed(reentrant)
    optimizer = sgd(model)

    def step(number, watch):
        model.fault = fault if number == 3 else None
        model(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    watch = watched(step, model, optimizer)
    assert place(watch) == (3, fault, "")
    assert {("inner", "fwd"), ("inner", "bwd")} <= {(row.module, row.direction) for row in watch.headroom()}


def test_a_fully_masked_row_is_invalid_not_an_input():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = sgd(attention)

    def step(number, watch):
        mask = torch.zeros(3, 3)
        if number == 3:
            mask[1] = -math.inf
        x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(number))
        attention(x, x, x, attn_mask=mask)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = watched(step, attention, optimizer).first_nonfinite
    assert (found.step, found.phase, found.op, found.cause) == (3, "forward", "aten._softmax", "invalid")


# -- what must not crash, or be blamed --------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "complex", "float64"])
def test_unusual_tensors_are_watched(kind):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4, sparse=kind == "sparse")
            self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64)) if kind == "complex" else None

        def forward(self, ids):
            x = self.embed(ids)
            return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4) if kind == "complex" else x

    model = Odd().double() if kind == "float64" else Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number, watch):
        out = model(torch.tensor([1, 2]))
        loss = out.square().mean() * (1e60 if kind == "float64" and number == 1 else 1)  # fits float64 alone
        (loss + (out * 0).sum().abs().sqrt() if number == 3 else loss).backward()
        optimizer.step() if number > 1 else None
        optimizer.zero_grad()

    found = watched(step, model, optimizer).first_nonfinite
    assert (found.step, found.phase, found.op) == (3, "backward", "aten.div") and found.replay["matched"]


@pytest.mark.parametrize("replay", [True, False])
def test_a_skip_of_a_fused_optimizer_is_a_skip(replay):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(number, watch):
        loss = model(batch(number)).square().mean()
        scaler.scale(loss + square_root_of_zero(model.b.weight) if number == 3 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    watch = watched(step, model, optimizer, scaler=scaler, replay=replay)
    (event,) = watch.events
    assert watch.first_nonfinite is None
    assert (event.step, event.detail["loss_scale"], event.detail["phase"]) == (3, 4.0, "backward")


def test_functional_calls_under_vmap_still_work():
    model = Net()
    watch = Watch(model, every=1)
    parameters = dict(model.named_parameters())
    with watch.step(1):
        gradient = torch.func.vmap(
            torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum()), (None, 0)
        )(parameters, batch(1))
    assert gradient["head.bias"].shape == (3, 2) and watch.first_nonfinite is None


def test_parametrizations_are_no_layers():
    part = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    assert list(blocks(nn.Sequential(part, nn.Linear(4, 2)))) == ["0", "1"]


def test_an_optimizer_that_calls_a_closure_updates_after_it_too():
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def step(number, watch):
        optimizer.param_groups[0]["lr"] = 3e38 if number == 3 else 0.1

        def closure():
            optimizer.zero_grad()
            loss = (model(batch(number)) * 30).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    found = watched(step, model, optimizer).first_nonfinite
    assert (found.step, found.phase, found.replay["matched"]) == (3, "optimizer", True)


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


def test_closing_in_any_order_leaves_no_hook():
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


# -- after the update -------------------------------------------------------------------------


def normalise(model, number):
    """Every row to length 1, as nGPT does after an update; at step 3 a row of zeros divides 0 by 0."""
    if number == 3:
        model.b.weight.data[0].zero_()
    model.b.weight.data.copy_(model.b.weight.data / model.b.weight.data.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(("shared", "module"), [(False, "b"), (True, None)])
def test_what_is_computed_from_weights_after_the_update_is_of_the_module_that_has_them(shared, module):
    model = Net()
    optimizer = sgd(model)

    def step(number, watch):
        model(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 3:
            with torch.no_grad():
                others = (model.a.weight - model.a.weight).norm() if shared else 0.0
                model.b.weight.mul_(1 / ((model.b.weight - model.b.weight).norm() + others))

    found = watched(step, model, optimizer).first_nonfinite
    assert (found.phase, found.op, found.cause, found.module) == ("after", "aten.reciprocal", "invalid", module)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_nan_written_into_a_weight_between_update_and_forward_is_of_the_phase_after(inside, replay, scaled):
    model = Net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None

    def step(number):
        loss = model(batch(number)).square().mean()
        (scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if inside:
            normalise(model, number)

    watch = Watch(model, optimizer, scaler=scaler, every=1, replay=step if replay else None)
    for number in range(1, 6):
        with watch.step(number):
            step(number)
        if not inside:
            normalise(model, number)
    found = watch.first_nonfinite
    watch.close()
    assert (found.step, found.phase, found.phase_surfaced, found.module) == (3, "after", "after", "b")
    assert (found.kind, found.dtype) == ("nan", "float32")
    assert found.tensor == ("output" if replay and inside else "param")  # the quotient, which is copied into the weight
    if replay and inside:
        assert (found.op, found.cause, found.replay["matched"]) == ("aten.div", "invalid", True)
    if replay and not inside:
        assert found.replay["matched"] is False and "between two steps" in found.replay["error"]
    assert FirstNonfinite(**msgspec.structs.asdict(found)) == found


REPAIRS = {
    "in place": lambda p: p.grad.nan_to_num_(posinf=0.0),
    "through .data": lambda p: p.grad.data.nan_to_num_(posinf=0.0),
    "a new tensor": lambda p: setattr(p, "grad", p.grad.nan_to_num(posinf=0.0)),
}


@pytest.mark.parametrize("how", [*REPAIRS, "nothing", "all but one"])
@pytest.mark.parametrize("replay", [True, False])
def test_gradients_repaired_before_the_update_are_an_event_and_no_divergence(how, replay):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(number, watch):
        loss = model(batch(number)).square().mean()
        (loss + sum(map(square_root_of_zero, model.parameters())) if number == 3 else loss).backward()
        for parameter in [*model.parameters()][how == "all but one" :] if how != "nothing" else ():
            REPAIRS.get(how, REPAIRS["in place"])(parameter)
        optimizer.step()
        optimizer.zero_grad()

    watch = watched(step, model, optimizer, replay=replay)
    if how in REPAIRS:
        assert watch.first_nonfinite is None and all(p.isfinite().all() for p in model.parameters())
        (event,) = watch.events
        assert (event.step, event.kind) == (3, "gradient_repaired")
        assert event.detail["tensor"] == "grad" and event.detail["kind"] == "nan"
    else:
        assert place(watch)[:2] == (3, "backward") and watch.events == []


# -- a watch that fails -----------------------------------------------------------------------

PARTS = [
    "counters.StepCounters." + name
    for name in "begin measure_between loss measure_gradients updating measure_update measure_after end read".split()
] + [
    *("taps.ModuleTaps.begin_step", "taps.ModuleTaps._measure", "taps.ModuleTaps.end_step", "taps.ModuleTaps.read"),
    *("surface.Surface.first_nonfinite", "surface.Surface.seen", "watch.Replays.keep", "watch.Replays.again"),
    *("watch.Replays.completed", "watch.Replayed.completed", "watch.Watch._await_backward", "watch.HeadroomTable.add"),
]


@pytest.mark.parametrize("part", PARTS)
def test_whatever_fails_in_a_watch_the_loop_continues_and_an_event_says_why(part, monkeypatch):
    def train(watched):
        torch.manual_seed(0)
        model = Net()
        optimizer = sgd(model)
        watch = Watch(model, optimizer, every=1, log_every=2, replay=lambda step: run(step)) if watched else None

        def run(number):
            loss = model(batch(number)).square().mean() / (number != 5)
            if watch:
                watch.loss(loss)
            loss.backward()
            if number < 5:
                optimizer.step()
            optimizer.zero_grad()

        for number in range(1, 8):
            with watch.step(number) if watch else nullcontext():
                run(number)
        if watch:
            watch.headroom()
            watch.close()
        return watch, state_of(model, optimizer)

    _, unwatched = train(False)
    target, _, name = part.rpartition(".")

    def fails(*args, **kwargs):
        raise OverflowError(f"planted in {name}")

    monkeypatch.setattr(f"instrument.watch.{target}.{name}", fails)
    watch, state = train(True)
    assert all(map(torch.equal, state, unwatched))
    said = [event.detail["what"] for event in watch.events if event.kind == "warning"]
    found = watch.first_nonfinite
    said += [found.replay.get("error", "")] if found and found.replay else []
    assert any(f"OverflowError: planted in {name}" in text for text in said)


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
