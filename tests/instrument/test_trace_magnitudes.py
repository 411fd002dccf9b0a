"""Counters are the modules' own largest values, in both directions and in order; arrows start at the producer."""

import gzip
import json
import math

import pytest
import torch
from torch import nn

from instrument.trace.tracks import CounterSample
from instrument.trace.window import ModuleMagnitudes, TraceWindow, flows_from

CPU = torch.device("cpu")


class Net(nn.Module):
    """A list of blocks, an output in a dict, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x) + self.head(2 * x)}


def test_values_are_the_largest_magnitudes_of_outputs_and_of_their_gradients():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4)
    hidden = torch.tanh(net.blocks[0][0](x)).detach().requires_grad_()

    def loss(output):
        return (output["logits"] ** 2).sum()

    with ModuleMagnitudes(net) as magnitudes:
        loss(net(x)).backward()
    samples = magnitudes.samples()
    assert [s.unix_ns for s in samples] == sorted(s.unix_ns for s in samples)
    forward = {s.name: s.fwd for s in samples if s.fwd is not None and s.name != "head"}
    assert forward["blocks.0.1"] == forward["blocks.0"] == pytest.approx(hidden.abs().max().item())
    y = net.blocks[1](hidden)
    loss({"logits": net.head(y) + net.head(2 * y)}).backward()
    (backward,) = {s.bwd for s in samples if s.name == "blocks.0.1" and s.bwd is not None}
    assert backward == pytest.approx(hidden.grad.abs().max().item())
    assert sum(s.name == "head" and s.fwd is not None for s in samples) == 2


def test_nothing_is_watched_behind_the_window_and_nothing_is_left():
    net = Net()
    with ModuleMagnitudes(net) as magnitudes:
        loss = net(torch.randn(3, 4))["logits"].sum()
    before = len(magnitudes.samples())
    loss.backward()
    net(torch.randn(3, 4))
    assert len(magnitudes.samples()) == before == 8
    assert not any(module._forward_hooks for module in net.modules())
    with ModuleMagnitudes(net) as magnitudes, torch.no_grad():
        net(torch.randn(3, 4))
    assert all(sample.bwd is None for sample in magnitudes.samples())
    assert ModuleMagnitudes(net).samples() == []


def test_arrows_go_from_the_producer_to_what_is_bad_behind_it():
    samples = [
        CounterSample(1, "earlier", fwd=math.inf),
        CounterSample(2, "a", fwd=1.0),
        CounterSample(3, "b", fwd=math.inf),
        CounterSample(4, "c", fwd=2.0),
        CounterSample(5, "d", fwd=math.nan),
        CounterSample(6, "d", bwd=math.nan),
        CounterSample(7, "a", bwd=math.nan),
    ]
    assert [(f.producer, f.from_unix_ns, f.propagator, f.to_unix_ns) for f in flows_from("b", samples)] == [
        ("b", 3, "d", 5),
        ("b", 3, "a", 7),
    ]
    assert flows_from("c", samples) == [] and len(flows_from("earlier", samples, limit=1)) == 1


def test_a_trace_shows_an_overflow_and_its_way(tmp_path):
    """A weight scaled beyond fp16: the counter ends, a marker stands there, arrows lead on; our own reductions are ours."""
    net = Net().half()
    net.blocks[0][0].bias.data.fill_(9)  # tanh gives 1, four times 65,000 is too much, and nothing bounds it
    net.blocks[1][0].weight.data.fill_(65_000)
    net.blocks[1][1] = nn.Identity()
    path = tmp_path / "overflow.json.gz"
    with TraceWindow(path, CPU) as trace:
        with ModuleMagnitudes(net) as magnitudes, trace.phase("forward", 1):
            net(torch.ones(3, 4).half())
        samples = magnitudes.samples()
        flows = flows_from("blocks.1.0", samples)
        trace.add(*samples, *flows)
    bad = [s.name for s in samples if not math.isfinite(s.fwd)]
    assert bad[0] == "blocks.1.0" and {f.propagator for f in flows} == set(bad[1:])
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(e["name"] == "absmax blocks.1.0 is not finite" for e in events)
    assert trace.table()["seconds"]["ours"]["forward"] > 0
