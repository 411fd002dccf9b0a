"""How memory stood when it ran out: the allocator's figures on a GPU, the process' and its limits' on the host."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from typing import Any

import psutil
import torch

from instrument.sampler.gpu import GpuSensors

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ALLOCATOR = {
    "allocated_bytes": "allocated_bytes.all.current",
    "reserved_bytes": "reserved_bytes.all.current",
    "active_bytes": "active_bytes.all.current",
    "inactive_split_bytes": "inactive_split_bytes.all.current",
    "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
}
"""Our names and those of ``torch.cuda.memory_stats``."""
HOST = "host_oom"


def memory_when_it_ran_out(message: str, device: torch.device, cause: str) -> dict[str, Any]:
    """For a row's ``flags["oom"]``: ``requested_bytes`` as the error's message has it (rounded there), and the figures of
    the memory that ran out, the host's for ``cause`` `HOST`. What cannot be read is null, with the reason in ``unknown``.
    Never raises."""
    figures: dict[str, Any] = {"requested_bytes": requested_bytes(message), "unknown": {}}
    for read in (_process, _limits, _machine) if cause == HOST else (_allocator, _device, _company):
        _ask(read, device, figures)
    return figures


def requested_bytes(message: str) -> int | None:
    """What torch says it tried to allocate, of which it prints two decimals."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", message)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def _ask(read: Callable[[torch.device], dict[str, Any]], device: torch.device, figures: dict[str, Any]) -> None:
    try:
        figures |= read(device)
    except Exception as error:  # memory is short, and a driver may be gone
        figures["unknown"][read.__name__.strip("_")] = f"{type(error).__name__}: {error}"


def _allocator(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return dict.fromkeys(ALLOCATOR) | {"unknown": {"allocator": "torch's allocator counts nothing on a CPU"}}
    stats = torch.cuda.memory_stats(device)
    return {ours: stats.get(theirs) for ours, theirs in ALLOCATOR.items()}


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {"device_free_bytes": free_bytes, "device_total_bytes": total_bytes}


def _company(device: torch.device) -> dict[str, Any]:
    """Whether others hold memory of the same device."""
    if device.type != "cuda":
        return {}
    sensors = GpuSensors(str(torch.cuda.get_device_properties(device).uuid))
    try:
        sensors.read()  # opens the library
        return {"company": sensors.company()}
    finally:
        sensors.close()


def _process(device: torch.device) -> dict[str, Any]:
    memory = psutil.Process().memory_info()
    return {"rss_bytes": memory.rss, "virtual_bytes": memory.vms}


def _limits(device: torch.device) -> dict[str, Any]:
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return {"address_space_limit_bytes": None if soft == resource.RLIM_INFINITY else soft}


def _machine(device: torch.device) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"available_bytes": memory.available, "total_bytes": memory.total}
