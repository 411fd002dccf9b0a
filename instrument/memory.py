"""Where a training process' memory is: by storage, at its peak, and in a snapshot file when it runs out.

Three figures of a GPU's memory differ and all are reported: *allocated* (bytes in live tensors),
*reserved* (what torch's allocator holds from the driver), both of this process, and the *device*
total of NVML (contexts, libraries and other processes too; `instrument.sampler`).

When memory runs out, the allocator's figures (on a GPU) or the process' and its limits (on the host) are recorded.
"""

from __future__ import annotations

import re
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from instrument.results.files import replacing
from instrument.sampler.gpu import GpuSensors

SNAPSHOT_ENTRIES = 100_000
"""Allocations and frees whose stacks a recorded history keeps (about 100 MB of host memory)."""
KINDS = ("weights", "buffers", "gradients", "optimizer")


def memory_split(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Bytes of ``weights``, ``buffers``, ``gradients`` and ``optimizer`` states as they are stored.

    A storage counts once, whole, under the first kind that holds it: tied weights, views and tables
    shared by all parameters are not counted again. 8-bit states count their own bytes and their
    scales'. ``by_dtype`` has the same bytes, ``elsewhere_bytes`` what is not on the first weight's device
    (step counters on the host, say), which no other figure includes. ``gradients_bytes`` are those held
    now, none after ``zero_grad``; ``gradients_complete_bytes`` is one for every trainable weight.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensors = {
        "weights": model.parameters(),
        "buffers": model.buffers(),
        "gradients": (p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": tree_leaves(list(optimizer.state.values())) if optimizer is not None else (),
    }
    seen: set[int] = set()
    by_dtype: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    elsewhere_bytes = 0
    for kind in KINDS:
        for on, dtype, n_bytes in _new_storages(tensors[kind], seen):
            if on == device:
                by_dtype[kind][dtype] += n_bytes
            else:
                elsewhere_bytes += n_bytes
    return {
        "device": str(device),
        **{f"{kind}_bytes": sum(by_dtype[kind].values()) for kind in KINDS},
        "gradients_complete_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "by_dtype": {kind: dict(found) for kind, found in by_dtype.items()},
        "elsewhere_bytes": elsewhere_bytes,
    }


def with_activations(split: dict[str, Any], peak_allocated_bytes: int | None, *, instrument_bytes: int = 0) -> dict[str, Any]:
    """``split`` and what the peak holds beyond it: activations and temporaries.

    ``activations_bytes`` takes all gradients to be there at the peak, as they are from the second
    micro-batch on; with one micro-batch the peak comes before most of them exist, so the truth lies
    between that and ``activations_at_most_bytes``. A CPU has no peak of its allocator: null, and ``why``.
    """
    why = least_bytes = None
    gradients_bytes = split["gradients_complete_bytes"]
    if peak_allocated_bytes is None:
        why = "torch keeps no peak of the memory it allocates on a CPU"
    else:
        stored_bytes = gradients_bytes + sum(split[f"{kind}_bytes"] for kind in KINDS if kind != "gradients")
        least_bytes = peak_allocated_bytes - instrument_bytes - stored_bytes
        if least_bytes < 0:
            why, least_bytes = "the peak is below what is stored now: it was taken before that was made", None
    return split | {
        "activations_bytes": least_bytes,
        "activations_at_most_bytes": None if least_bytes is None else least_bytes + gradients_bytes,
        "why_no_activations": why,
    }


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the bytes, by dtype, of the storages that a forward pass inside it keeps for backward, weights left out: on any
    device the exact part of the activations that must live until backward, which a peak also has temporaries in.

    Costs host time at every saved tensor: for one pass outside all timing. The graph must be alive
    at the end of the block (hold on to the loss), or a storage freed and used again counts once.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: Counter[str] = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for _, dtype, n_bytes in _new_storages([tensor], seen):
            saved[dtype] += n_bytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _new_storages(tensors: Iterable[object], seen: set[int]) -> Iterator[tuple[torch.device, str, int]]:
    """Device, dtype and bytes of every storage that is not in ``seen`` yet, and now is. A sparse gradient has two."""
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            continue
        for part in (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,):
            storage = part.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield part.device, str(part.dtype).removeprefix("torch."), storage.nbytes()


@dataclass
class Snapshot:
    """Where the allocator's snapshot was written, or ``why`` there is none. ``history``: it has the stacks of allocations."""

    path: Path | None = None
    why: str | None = None
    history: bool = False


@contextmanager
def snapshot_on_oom(path: Path, device: torch.device, *, history: bool = False, always: bool = False) -> Iterator[Snapshot]:
    """Writes the allocator's state to ``path`` (for https://pytorch.org/memory_viz) when the block runs out
    of memory, or with ``always`` at its end too; an error is raised again. ``history`` also records the stack of
    every allocation, which costs time.
    """
    outcome = Snapshot(why="memory did not run out")
    if history and device.type == "cuda":
        with suppress(Exception):  # a torch that cannot
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
            outcome.history = True

    def write() -> None:
        if device.type != "cuda":
            outcome.why = "torch's allocator keeps no snapshot on a CPU"
            return
        try:
            with replacing(path) as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            outcome.path, outcome.why = path, None
        except Exception as error:  # a full disk, a driver that gave up
            outcome.why = f"{type(error).__name__}: {error}"

    try:
        yield outcome
        if always:
            write()
    except torch.OutOfMemoryError:  # its traceback still holds the tensors
        write()
        raise
    finally:
        if outcome.history:
            with suppress(Exception):
                torch.cuda.memory._record_memory_history(enabled=None)


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
    for read in (_host,) if cause == HOST else (_allocator, _device, _company):
        try:
            figures |= read(device)
        except Exception as error:  # memory is short, and a driver may be gone
            figures["unknown"][read.__name__.strip("_")] = f"{type(error).__name__}: {error}"
    return figures


def requested_bytes(message: str) -> int | None:
    """What torch says it tried to allocate, of which it prints two decimals."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", message)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


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


def _host(device: torch.device) -> dict[str, Any]:
    process, machine, soft = psutil.Process().memory_info(), psutil.virtual_memory(), resource.getrlimit(resource.RLIMIT_AS)[0]
    return {
        "rss_bytes": process.rss,
        "virtual_bytes": process.vms,
        "address_space_limit_bytes": None if soft == resource.RLIM_INFINITY else soft,
        "available_bytes": machine.available,
        "total_bytes": machine.total,
    }
