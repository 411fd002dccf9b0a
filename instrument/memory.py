"""Where a training process' memory is: by storage, at its peak, and in a snapshot file when it runs out.

Three figures of a GPU's memory differ and all are reported: *allocated* (bytes in live tensors),
*reserved* (what torch's allocator holds from the driver), both of this process, and the *device*
total of NVML (contexts, libraries and other processes too; `instrument.sampler`).

When memory runs out, the allocator's figures (on a GPU) or the process' and its limits (on the host) are recorded.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

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
    seen: set[int] = set()
    by_dtype: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    elsewhere_bytes = 0
    for kind, tensors in _tensors_by_kind(model, optimizer):
        for part in (part for tensor in tensors for part in _strided_parts(tensor)):
            storage = part.untyped_storage()
            if storage._cdata in seen:
                continue
            seen.add(storage._cdata)
            if part.device != device:
                elsewhere_bytes += storage.nbytes()
                continue
            dtype = str(part.dtype).removeprefix("torch.")
            by_dtype[kind][dtype] = by_dtype[kind].get(dtype, 0) + storage.nbytes()
    return {
        "device": str(device),
        **{f"{kind}_bytes": sum(by_dtype[kind].values()) for kind in KINDS},
        "gradients_complete_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "by_dtype": by_dtype,
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


@dataclass
class Saved:
    """``bytes``: storages that autograd keeps for backward; ``by_dtype`` the same."""

    bytes: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Counts what a forward pass inside it keeps for backward, weights left out: on any device the exact
    part of the activations that must live until backward, which a peak also has temporaries in.

    Costs host time at every saved tensor: for one pass outside all timing. The graph must be alive
    at the end of the block (hold on to the loss), or a storage freed and used again counts once.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved, seen = Saved(), set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in _strided_parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in seen and storage._cdata not in weights:
                seen.add(storage._cdata)
                saved.bytes += storage.nbytes()
                dtype = str(part.dtype).removeprefix("torch.")
                saved.by_dtype[dtype] = saved.by_dtype.get(dtype, 0) + storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


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
    outcome = Snapshot(why="memory did not run out", history=history and device.type == "cuda" and _record_history(True))

    def write() -> None:
        written = write_snapshot(path, device)
        outcome.path, outcome.why = written.path, written.why

    try:
        yield outcome
        if always:
            write()
    except torch.OutOfMemoryError:  # its traceback still holds the tensors
        write()
        raise
    finally:
        if outcome.history:
            _record_history(False)


def write_snapshot(path: Path, device: torch.device) -> Snapshot:
    """The allocator's snapshot now. Never raises: what went wrong is in ``why``."""
    if device.type != "cuda":
        return Snapshot(why="torch's allocator keeps no snapshot on a CPU")
    try:
        with replacing(path) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
    except Exception as error:  # a full disk, a driver that gave up
        return Snapshot(why=f"{type(error).__name__}: {error}")
    return Snapshot(path=path)


def _record_history(on: bool) -> bool:
    """Start or stop recording; False where this torch cannot."""
    try:
        if on:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        else:
            torch.cuda.memory._record_memory_history(enabled=None)
    except Exception:
        return False
    return True


def _tensors_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    yield "weights", iter(model.parameters())
    yield "buffers", iter(model.buffers())
    yield "gradients", (p.grad for p in model.parameters() if p.grad is not None)
    if optimizer is not None:
        yield "optimizer", (tensor for state in optimizer.state.values() for tensor in _leaves(state))


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _strided_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A sparse gradient is two ordinary tensors."""
    return (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)


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
