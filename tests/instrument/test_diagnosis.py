"""Causes: the op again in float64 from the same inputs."""

import pytest
import torch
from torch import nn

from instrument.replay.replays import examine
from instrument.replay.snapshot import Snapshot


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


def test_the_same_op_in_fp32_is_healthy():
    assert why(lambda w, x: w * x, [300.0], [300.0], torch.float32) is None


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
