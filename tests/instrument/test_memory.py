"""Bytes by real storage, an honest peak, and a snapshot that never makes things worse."""

from pathlib import Path

import pytest
import torch
from torch import nn

from instrument.memory import (
    memory_split,
    peak_memory,
    saved_for_backward,
    snapshot_on_oom,
    with_activations,
    write_snapshot,
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


def test_meta_tensors_are_told_apart():
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
    assert saved.bytes == (8 * 16 + 8 * 32) * 4 and saved.by_dtype == {"float32": saved.bytes}
    with saved_for_backward(model) as bf16, torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(inputs)
    assert bf16.by_dtype["bfloat16"] > 0 and half.dtype == torch.bfloat16 and output.requires_grad
    with torch.no_grad(), saved_for_backward(model) as nothing:
        model(inputs)
    assert nothing.bytes == 0


def test_peaks_of_a_run_on_a_cpu():
    peaks = peak_memory(CPU, peak_device_bytes=None)
    assert peaks["peak_rss_bytes"] > 50e6 and [peaks[k] for k in peaks if k != "peak_rss_bytes"] == [None] * 3


def test_a_cpu_has_no_snapshot_and_the_error_goes_on(tmp_path):
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
    assert write_snapshot(tmp_path / "s.pickle", CUDA).why == "OSError: No space left on device"
