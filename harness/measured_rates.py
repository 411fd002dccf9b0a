"""The measured rates in ``machine.json``: put there by ``doctor --measure``, read by every run for its
``mfu_measured_peak``. They hold for the machine that they were measured on, and for no other.

Measured are products of square matrices of random normal numbers (zeros run faster than data: they switch fewer
transistors), in every dtype, with the run's switches set and proven. The best size counts, by its median:
a ceiling that real products can reach, unlike a datasheet's. ``copy``: bytes read plus bytes written by
``dst.copy_(src)`` of a block that no cache holds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from harness import fp16_products
from harness.precision import DTYPES, set_switches
from instrument.mfu import capability_support
from instrument.results.files import read_plain, replace
from instrument.results.folder import OutputError, require_writable
from instrument.results.lines import json_object
from instrument.results.schemas import RecordError
from instrument.terminal import count

IDENTITY = ("cpu", "gpu")
BUSY_FRAC = 0.1
HOW_TO = "`python -m harness doctor --measure` (with the same --out) measures them"


def merge_measured(out: Path, machine: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put ``measured`` into the folder's ``machine.json``, in place of older rates; all other facts stay.

    ``machine`` (`instrument.environment.capture`) is what a new file begins with. Raises `OutputError` when
    the file is another machine's or cannot be read.
    """
    refuse_another_machine(out, machine)
    facts = read_machine(out)
    whole = {**(machine if facts is None else facts), "measured": measured}
    replace(out / "machine.json", json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n")


def refuse_another_machine(out: Path, machine: Mapping[str, Any]) -> None:
    """Raise `OutputError` unless rates measured here may be written into the folder: asked before measuring."""
    require_writable(out)
    other = another_machine(read_machine(out) or machine, machine)
    if other:
        raise OutputError(f"{out / 'machine.json'} {other}: choose another folder with --out")


Rates = tuple[dict[str, float] | None, str | None]
"""FLOP/s by dtype, and what to know about them or None; or None, and why not."""


def rates_measured_here(out: Path, machine: Mapping[str, Any], threads: int | None) -> Rates:
    """``threads``: torch's on a CPU, None on CUDA."""
    try:
        facts = read_machine(out)
    except OutputError as error:
        return None, str(error)
    if facts is None or not facts.get("measured"):
        return None, f"no rates were measured here; {HOW_TO}"
    if other := another_machine(facts, machine):
        return None, f"machine.json {other}"
    rows = facts["measured"]["matmul"]
    rates = {row["dtype"]: row["flops_per_s"] for row in rows if row["threads"] == threads}
    if not rates:
        known = sorted({row["threads"] for row in rows if row["threads"] is not None})
        measured = f"{' and '.join(map(str, known))} CPU {'thread' if known == [1] else 'threads'}" if known else "the GPU"
        used = count(threads, "CPU thread") if threads else "the GPU"
        return None, f"rates were measured on {measured}, and this run uses {used}"
    return rates, too_low(facts["measured"])


def too_low(measured: Mapping[str, Any]) -> str | None:
    """Why the rates are no ceiling: other work had the cores, so MFU against them comes out too high."""
    busy = measured.get("cpu_busy_before_frac")
    if busy is None or busy <= BUSY_FRAC:
        return None
    return f"other work took {busy:.0%} of the CPU before, so these rates are too low: measure again when it is idle"


def another_machine(facts: Mapping[str, Any], machine: Mapping[str, Any]) -> str | None:
    """``describes ..., and this is ...`` when the facts are of another processor or GPU."""
    for name in IDENTITY:
        there, here = facts.get(name) or "none", machine.get(name) or "none"
        if there != here:
            return f"describes a machine with {name} {there}, and this one has {here}"
    return None


def read_machine(out: Path) -> dict[str, Any] | None:
    """The folder's ``machine.json``; None when there is none. Raises `OutputError` when it is no JSON object."""
    path = out / "machine.json"
    try:
        return json_object(read_plain(path))
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise OutputError(f"{path}: {error}; move it away, and the next run writes it anew") from error


SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
BUDGET_S, AT_LEAST = 0.3, 7
"""Seconds for one size in one dtype, and the fewest samples whatever they take."""


def measure(device: torch.device) -> dict[str, object]:
    """``matmul`` and ``copy``: a row for each dtype and number of threads (null on CUDA), rates per second as
    median, and 10th and 90th percentile as spread. ``cpu_busy_before_frac``: the share of all cores that other
    work took just before (null on CUDA); it lowers what is measured, and no percentile shows that."""
    busy = psutil.cpu_percent(interval=0.5) / 100 if device.type == "cpu" else None
    matmul, copies = [], []
    with threads_restored() as default_threads:
        for threads in (None,) if device.type == "cuda" else sorted({1, default_threads}):
            matmul += [row for dtype in dtypes_of(device) if (row := matmul_rate(device, dtype, threads))]
            copies.append(copy_rate(device, threads))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch_version": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_busy_before_frac": busy,
        "matmul": matmul,
        "copy": copies,
    }


@contextmanager
def threads_restored() -> Iterator[int]:
    """Gives torch's number of threads, which is what a run with ``--threads 0`` uses, and puts it back."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def dtypes_of(device: torch.device) -> list[str]:
    """The kinds of products that exist on the device: TF32 on tensor cores only, bf16 where the card has it."""
    if device.type == "cpu":
        return list(DTYPES)
    support = capability_support(*torch.cuda.get_device_capability(device))
    return ["fp32", *(name for name in ("tf32", "fp16", "bf16") if support[name])]


def matmul_rate(device: torch.device, dtype: str, threads: int | None) -> dict[str, object] | None:
    """The best size's rate in FLOP/s; None when not even the smallest fits into memory."""
    set_switches(device, tf32=dtype == "tf32", threads=threads or 0)
    replaced = dtype == "fp16" and device.type == "cpu" and not fp16_products.cpu_has_fp16_arithmetic()
    found = []
    with fp16_products.installed() if replaced else nullcontext():
        for size in SIZES[device.type]:
            try:
                left, right = (torch.randn(size, size, device=device).to(DTYPES.get(dtype, torch.float32)) for _ in range(2))
                times_s = sample(lambda left=left, right=right: left @ right, device)
            except torch.OutOfMemoryError:
                break
            row = {"dtype": dtype, "threads": threads, **rates("flops_per_s", 2 * size**3, times_s)}
            found.append(row | {"size": size, "how": "fp32, rounded once to fp16" if replaced else "native"})
    set_switches(device, tf32=False, threads=0)
    return max(found, key=lambda row: row["flops_per_s"], default=None)


def copy_rate(device: torch.device, threads: int | None) -> dict[str, object]:
    """Bytes per second, read and written."""
    if threads:
        torch.set_num_threads(threads)
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    times_s = sample(lambda: target.copy_(source), device)
    return {"threads": threads, **rates("bytes_per_s", 2 * source.nbytes, times_s), "block_bytes": source.nbytes}


def rates(name: str, amount: float, times_s: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of ``amount`` per second, and the number of samples."""
    deciles = statistics.quantiles(times_s, n=10, method="inclusive")
    return {
        name: amount / statistics.median(times_s),
        f"p10_{name}": amount / deciles[-1],
        f"p90_{name}": amount / deciles[0],
        "samples": len(times_s),
    }


def sample(work: Callable[[], object], device: torch.device, budget_s: float = BUDGET_S) -> list[float]:
    """Seconds of each repetition, after two that warm up; on CUDA by events, without waiting in between."""
    work()
    work()
    if device.type == "cuda":
        return _cuda_sample(work, device, budget_s)
    times_s, ends = [], time.perf_counter() + budget_s
    while len(times_s) < AT_LEAST or time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began)
    return times_s


def _cuda_sample(work: Callable[[], object], device: torch.device, budget_s: float) -> list[float]:
    """One event between every two repetitions, as many of them as fill the budget."""

    def times_s(repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]

    return times_s(max(AT_LEAST, min(1000, int(budget_s / times_s(1)[0]))))
