"""Bytes by real storage, an honest peak, a snapshot that never makes things worse, and how memory stood when it ran out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from instrument.memory import (
    ALLOCATOR,
    memory_split,
    memory_when_it_ran_out,
    requested_bytes,
    saved_for_backward,
    snapshot_on_oom,
    with_activations,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self, rows=100, width=8):
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(10))

    def forward(self, ids):
        return self.head(self.embedding(ids))


def step(model, optimizer, *inputs):
    model(*inputs).square().mean().backward()
    optimizer.step()


def test_weights_gradients_and_adamw_states_by_the_closed_form():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))  # 40 + 18 numbers
    optimizer = torch.optim.AdamW(model.parameters())
    assert memory_split(model, optimizer)["gradients_bytes"] == memory_split(model, optimizer)["optimizer_bytes"] == 0
    step(model, optimizer, torch.randn(2, 7))
    split = memory_split(model, optimizer)
    assert (split["weights_bytes"], split["gradients_bytes"], split["buffers_bytes"]) == (58 * 4, 58 * 4, 0)
    assert split["optimizer_bytes"] == 2 * 58 * 4 + 4 * 4  # and a step counter of 4 bytes per tensor
    assert split["by_dtype"]["optimizer"] == {"float32": split["optimizer_bytes"]} and split["elsewhere_bytes"] == 0
    optimizer.zero_grad()
    model[0].bias.requires_grad_(False)
    split = memory_split(model, optimizer)
    assert (split["gradients_bytes"], split["gradients_complete_bytes"]) == (0, 53 * 4)


def test_a_shared_storage_counts_once():
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    step(model, optimizer, torch.arange(10)[None])
    split = memory_split(model, optimizer)
    assert split["weights_bytes"] == split["gradients_bytes"] == split["optimizer_bytes"] == 100 * 8 * 4
    assert split["gradients_complete_bytes"] == 100 * 8 * 4
    assert split["buffers_bytes"] == 80 and split["by_dtype"]["buffers"] == {"int64": 80}
    flat = torch.zeros(100)
    model.a, model.b = nn.Parameter(flat[:10]), nn.Parameter(flat[10:20])
    assert memory_split(model)["weights_bytes"] == 100 * 8 * 4 + 400  # the whole of what two views keep alive


def test_meta_tensors_are_distinct():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(7, 5))
    assert memory_split(model)["weights_bytes"] == 2 * 40 * 4


def test_what_is_on_another_device_is_counted_apart():
    with torch.device("meta"):
        model = nn.Linear(7, 5)
    model.register_buffer("here", torch.zeros(3))
    split = memory_split(model)
    assert split["device"] == "meta" and split["elsewhere_bytes"] == 12 and split["buffers_bytes"] == 0


def test_sparse_gradients_count_indices_and_values():
    model = nn.Embedding(1000, 8, sparse=True)
    model(torch.tensor([1, 2, 3])).sum().backward()
    assert memory_split(model)["gradients_bytes"] == 3 * 8 * 4 + 3 * 8


def test_8_bit_states_count_their_bytes_and_their_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Linear(256, 256, bias=False)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    step(model, optimizer, torch.randn(2, 256))
    split = memory_split(model, optimizer)
    assert split["by_dtype"]["optimizer"]["uint8"] == 2 * 256 * 256
    tables_and_scales = split["optimizer_bytes"] - 2 * 256 * 256
    assert 2 * 256 * 4 + 2 * 4 * 256 <= tables_and_scales <= 2 * 256 * 4 + 2 * 4 * 256 + 64


def test_activations_are_what_the_peak_holds_beyond_the_rest():
    split = {
        "weights_bytes": 100,
        "buffers_bytes": 10,
        "gradients_bytes": 0,
        "optimizer_bytes": 200,
        "gradients_complete_bytes": 100,
    }
    found = with_activations(split, 1000, instrument_bytes=40)
    assert (found["activations_bytes"], found["activations_at_most_bytes"]) == (550, 650)
    for peak_bytes, why in ((None, "on a CPU"), (300, "below what is stored")):
        found = with_activations(split, peak_bytes)
        assert found["activations_bytes"] is None and why in found["why_no_activations"]


def test_what_is_saved_for_backward_is_counted_by_the_closed_form():
    """Two linear layers with a ReLU keep the input of each layer and the ReLU's output, which is one of them."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(8, 16)
    with saved_for_backward(model) as saved:
        output = model(inputs)
    assert saved == {"float32": (8 * 16 + 8 * 32) * 4}
    with saved_for_backward(model) as bf16, torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(inputs)
    assert bf16["bfloat16"] > 0 and half.dtype == torch.bfloat16 and output.requires_grad
    with torch.no_grad(), saved_for_backward(model) as nothing:
        model(inputs)
    assert not nothing


def test_a_cpu_has_no_snapshot_and_the_error_is_raised_again(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), snapshot_on_oom(tmp_path / "snapshot.pickle", CPU) as outcome:
        raise torch.OutOfMemoryError("out of memory")
    assert outcome.path is None and "CPU" in outcome.why


def test_a_snapshot_is_written_when_memory_runs_out_and_only_then(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"state"))
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: recorded.append(how))
    path = tmp_path / "run" / "snapshot.pickle"
    with snapshot_on_oom(path, CUDA) as outcome:
        pass
    assert outcome.path is None and outcome.why == "memory did not run out" and not recorded
    with pytest.raises(ValueError), snapshot_on_oom(path, CUDA):
        raise ValueError("not out of memory")
    assert not path.exists()
    with pytest.raises(torch.OutOfMemoryError), snapshot_on_oom(path, CUDA, history=True) as outcome:
        raise torch.OutOfMemoryError("out of memory")
    assert outcome.path == path and path.read_bytes() == b"state" and outcome.why is None
    assert recorded == [{"max_entries": 100_000}, {"enabled": None}] and outcome.history
    path.unlink()
    with snapshot_on_oom(path, CUDA, always=True) as outcome:
        pass
    assert outcome.path == path and path.exists() and not outcome.history


def test_a_snapshot_that_fails_says_why(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with snapshot_on_oom(tmp_path / "s.pickle", CUDA, always=True) as outcome:
        pass
    assert outcome.why == "OSError: No space left on device" and outcome.path is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.65 GiB", 20 << 20),
        ("CUDA out of memory. Tried to allocate 1.50 GiB.", 3 << 29),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes. Error code 12", 4_000_000_000),
        ("MemoryError", None),
    ],
)
def test_the_request_is_read_from_the_message(message, expected):
    assert requested_bytes(message) == expected


def test_the_allocators_figures_are_under_our_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {theirs: n for n, theirs in enumerate(ALLOCATOR.values())})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    figures = memory_when_it_ran_out("Tried to allocate 2.00 GiB", torch.device("cuda"), "cuda_oom")
    assert {name: figures[name] for name in ALLOCATOR} == {name: n for n, name in enumerate(ALLOCATOR)}
    assert (figures["device_free_bytes"], figures["device_total_bytes"], figures["requested_bytes"]) == (5, 100, 2 << 30)


def test_what_cannot_be_read_is_a_reason_and_no_number(monkeypatch):
    def fails(device):
        raise torch.AcceleratorError("CUDA error: gone")

    for name in ("memory_stats", "mem_get_info", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, fails)
    figures = memory_when_it_ran_out("", torch.device("cuda"), "cuda_oom")
    assert set(figures["unknown"]) == {"allocator", "device", "company"} and "gone" in figures["unknown"]["device"]
    on_a_cpu = memory_when_it_ran_out("", CPU, "cuda_oom")
    assert on_a_cpu["allocated_bytes"] is None and "on a CPU" in on_a_cpu["unknown"]["allocator"]


@pytest.mark.process
def test_the_hosts_figures_under_a_limit():
    code = """
import resource, torch
from instrument.memory import memory_when_it_ran_out
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
try:
    torch.empty(8 << 30, dtype=torch.uint8)
except RuntimeError as error:
    f = memory_when_it_ran_out(str(error), torch.device("cpu"), "host_oom")
assert f["requested_bytes"] == 8 << 30 and f["address_space_limit_bytes"] == 4 << 30 and not f["unknown"], f
assert 1e7 < f["rss_bytes"] < f["virtual_bytes"] < 4 << 30 and 0 < f["available_bytes"] <= f["total_bytes"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
