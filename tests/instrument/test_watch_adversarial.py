"""The watch on awkward models and in awkward loops: the truth is planted."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from instrument import Watch
from instrument.watch.hooks import blocks
from tests.instrument.awkward import Net, batch, place, sgd, square_root_of_zero, watched

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


def test_an_optimizer_that_calls_a_closure_goes_on_updating_behind_it():
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
