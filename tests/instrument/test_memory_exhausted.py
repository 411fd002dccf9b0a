"""How memory stood when it ran out."""

import subprocess
import sys

import pytest
import torch

from instrument.memory import ALLOCATOR, memory_when_it_ran_out, requested_bytes

CPU = torch.device("cpu")


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
