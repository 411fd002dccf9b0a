"""Snapshots put back what was there, bit for bit, in every optimizer; causes are the op again in float64."""

import pytest
import torch
from torch import nn

from harness.optimizer import adamw_for
from instrument.replay.replays import examine
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


class Toy(nn.Module):
    """Runs ``function(weight, input)``."""

    def __init__(self, function, weight, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
        self.function = function

    def forward(self, x):
        return self.function(self.weight, x)


def why(function, weight, x, dtype=torch.float16):
    model = Toy(function, weight, dtype)

    def step(number, recorder):
        loss = model(torch.tensor(x, dtype=dtype)).float().sum()
        if recorder:
            recorder.loss(loss)

    return examine(1, step, Snapshot(0, model, None), model, None)


@pytest.mark.parametrize(
    ("name", "function", "weight", "x", "cause", "kind", "op"),
    [
        ("product beyond fp16", lambda w, x: w * x, [300.0], [300.0], "overflow", "inf", "aten.mul"),
        ("negative product beyond fp16", lambda w, x: w * x, [-300.0], [300.0], "overflow", "-inf", "aten.mul"),
        ("exponential beyond fp16", lambda w, x: torch.exp(w * x), [3.0], [4.0], "overflow", "inf", "aten.exp"),
        ("sum beyond fp16", lambda w, x: w + x, [60000.0], [60000.0], "overflow", "inf", "aten.add"),
        ("cast beyond fp16", lambda w, x: (w.float() * x.float()).half(), [300.0], [300.0], "overflow", "inf", "aten._to_copy"),
        ("logarithm of a negative number", lambda w, x: torch.log(w * x), [-1.0], [1.0], "invalid", "nan", "aten.log"),
        ("zero by zero", lambda w, x: w / x, [0.0], [0.0], "invalid", "nan", "aten.div"),
        ("one by zero", lambda w, x: w / x, [1.0], [0.0], "invalid", "inf", "aten.div"),
        ("by a square that underflowed", lambda w, x: w / (x * x), [1.0], [1e-4], "underflow_then_divide", "inf", "aten.div"),
        (
            "by an epsilon that underflowed",
            lambda w, x: w / (x + 1e-8),
            [1.0],
            [0.0],
            "underflow_then_divide",
            "inf",
            "aten.div",
        ),
        ("handed in", lambda w, x: w * x, [1.0], [float("nan")], "from_input", "nan", "aten.mul"),
    ],
)
def test_causes(name, function, weight, x, cause, kind, op):
    found = why(function, weight, x)
    assert (found.cause, found.kind, found.op) == (cause, kind, op), name


def test_the_diagnosis_says_what_float64_gives_and_what_was_left():
    found = why(lambda w, x: w * x, [300.0, 1.0], [300.0, 1.0])
    d = found.diagnosis
    assert (d.output.exact_absmax, d.input_absmax, d.output.nonfinite, d.output.numel) == (90_000.0, 300.0, 1, 2)
    assert d.headroom_bits == pytest.approx(7.77, abs=0.01)  # log2(65,504 / 300)
    assert [(o.argument, o.dtype, o.absmax) for o in d.operands] == [("self", "float16", 300.0), ("other", "float16", 300.0)]


def test_only_the_zeros_that_failed_are_counted():
    """60,000 / 0.001 overflows beside 1 / 0, and 0 beside them divides nothing."""
    found = why(lambda w, x: torch.cat([w / x, x]), [1.0, 60_000.0, 1.0], [0.0, 1e-3, 1.0])
    assert (found.op, found.diagnosis.output.nonfinite, found.diagnosis.output.zero_denominators) == ("aten.div", 2, 1)


def test_a_second_moment_of_zero_beside_an_overflow_is_not_its_cause():
    """Fused AdamW in fp32: a step of 1e38 from 3e38 overflows; where no gradient came, exp_avg_sq = 0 is healthy."""
    weight = nn.Parameter(torch.tensor([-3e38, 1.0, 1.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.AdamW([weight], lr=1e38, weight_decay=0.0, fused=True)

    def step(number, recorder):
        (weight[:1] * 1.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = examine(1, step, Snapshot(0, model, optimizer), model, optimizer)
    assert (found.op, found.cause, found.diagnosis.output.zero_denominators) == ("aten._fused_adamw_", "overflow", 0)


@pytest.mark.parametrize(
    ("weights", "cause"), [([1e-45, 1e-45, 0.0], "overflow"), ([1e-45, 0.0], "invalid"), ([1e-45, 0.0, 0.0], "invalid")]
)
def test_what_holds_for_most_elements_is_the_cause(weights, cause):
    """(1e-45)^-8 is beyond float64, too; 0^-8 divides by zero."""
    found = why(lambda w, x: w.pow(-8), weights, weights, torch.float32)
    assert (found.op, found.cause) == ("aten.pow", cause)


def test_the_same_op_in_fp32_is_healthy():
    assert why(lambda w, x: w * x, [300.0], [300.0], torch.float32) is None


@pytest.mark.parametrize(("spoilt", "phase", "tensor"), [("gradient", "clip", "grad"), ("weight", "optimizer", "param")])
def test_what_was_there_before_the_step_is_of_the_phase_that_first_read_it(spoilt, phase, tensor):
    """After backward nothing says whether a loop clips or updates by hand: who reads a gradient clips, else it updates."""
    model = nn.Linear(2, 2)
    model.weight.grad = torch.zeros(2, 2)
    (model.weight.grad if spoilt == "gradient" else model.weight.data)[0, 0] = float("nan")

    def step(number, recorder):
        model.bias.sum().backward()
        with torch.no_grad():
            (model.weight.grad if spoilt == "gradient" else model.weight).mul_(0.5)

    found = examine(1, step, Snapshot(0, model, None), model, None)
    assert (found.phase, found.tensor, found.parameter, found.cause) == (phase, tensor, "weight", "from_input")


def test_adamw_in_fp16_fails_by_its_epsilon():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    x = torch.randn(4, 8).half()

    def step(number, recorder):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = examine(1, step, Snapshot(0, model, optimizer), model, optimizer)
    assert (found.phase, found.op, found.tensor, found.source_tensor) == (
        "optimizer",
        "aten._foreach_addcdiv_",
        "param",
        "exp_avg_sq",
    )
    assert found.cause == "underflow_then_divide" and found.parameter == "0.weight" and found.module == "0"
    assert found.diagnosis.output.zero_denominators == found.diagnosis.output.nonfinite > 0
