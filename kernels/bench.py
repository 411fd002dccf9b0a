"""Interleaved, L2-flushed timing of every op against eager torch, torch.compile and a plain copy.

    python -m kernels bench [--op NAME ...] [--dtype bf16 ...] [--shape 8192x50304 ...] [--json]

Each op has a function (device, dtype) that yields `BenchArm`s, in `ARMS` of its module. How a figure is made:

- arms of one case run in one process and in turns A B B A, where A is ours (the first arm);
  every ratio is the median over at least 30 such pairs, with its 95 % interval by order statistics
- "again" is ours against itself: a claim of 1 % needs its interval within 1 %
- "copy" is `dst.copy_(src)` moving the bytes that our arm has to move
- before each sample on a GPU the L2 is overwritten, and the stream is kept busy while the host
  queues the sample, so that launch latency of the host is not counted to any arm
- compilation and warm-up stay outside; inputs are random
"""

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from timeit import timeit
from typing import Any

SCHEMA = 1
PAIRS = 32
Sampling = Callable[[list[Callable]], list[float]]
"""Seconds of each call, one after the other."""
WARM_UP = 3
DTYPES = ("fp32", "bf16", "fp16")
HEADLINE = ("cross_entropy", "bf16 8192x50304")
"""The case that is measured first, then everything in bf16: a bench that is cut has what is quoted most."""

# Op -> the module whose ARMS list its arms (and whose CHECKS judge it), by hand, in the order of the README.
MODULES = {op: "kernels.logit_cases" for op in ("logit_stats", "cross_entropy", "bce_with_logits")}
MODULES |= {op: "kernels.list_cases" for op in ("multi_tensor_stats", "unscale", "scale", "activation_stats")}
MODULES |= {op: "kernels.scan_cases" for op in ("resolvent_mix", "selective_scan")}


@dataclass(frozen=True)
class BenchArm:
    """One way of computing one thing; arms with the same (op, case) are interleaved with each other.

    op           "cross_entropy"
    case         the dtype and shape, e.g. "bf16 8192x50304" or "fp32 gpt2-124m gradients"
    name         the way: "triton", "triton_no_stats", "eager", "compile", "liger", ...
                 The first arm of a case is ours; the others are compared with it.
    setup        called once, on the device; returns the zero-argument callable that is timed.
                 Inputs are random, never zeros. It must be repeatable (in-place ops: values may drift).
    bytes_moved  device-memory bytes that this arm must read plus write, counted by hand;
                 the copy reference moves the same number. 0: not compared with the copy.
    """

    op: str
    case: str
    name: str
    setup: Callable[[], Callable[[], object]]
    bytes_moved: int


@dataclass(frozen=True)
class BenchRow:
    """One arm of one case. Nothing that was not measured has a number.

    status            "measured", "unmeasured" (no such device here) or "failed" (note says why)
    time_s            median time of the arm
    time_over_ours    median ratio of its time to our arm's, in pairs, and its 95 % interval
    bytes_per_s       bytes_moved / time_s
    share_of_copy     median of (copy time / our time), for our arm only, and its 95 % interval
    """

    op: str
    case: str
    arm: str
    device: str
    status: str
    time_s: float | None = None
    time_over_ours: float | None = None
    time_over_ours_low: float | None = None
    time_over_ours_high: float | None = None
    bytes_moved: int | None = None
    bytes_per_s: float | None = None
    share_of_copy: float | None = None
    share_of_copy_low: float | None = None
    share_of_copy_high: float | None = None
    pairs: int | None = None
    note: str = ""


def timed(make: Callable[[], Any], call: Callable[[Any], object]) -> Callable[[], Callable[[], object]]:
    """The setup of an arm that makes its inputs once, and is timed at ``call(inputs)``."""

    def setup():
        inputs = make()
        return lambda: call(inputs)

    return setup


def own_name(device: str) -> str:
    """How our own arm is called: by the implementation that `impl="auto"` takes there."""
    return "triton" if device == "cuda" else "torch"


def known(ops: list[str] | None, modules: dict[str, str]) -> list[str]:
    """`ops`, or all of `modules`; ValueError names one that is not there."""
    for op in ops or ():
        if op not in modules:
            raise ValueError(f"unknown op {op!r}; one of {', '.join(modules)}")
    return ops or list(modules)


def collect(
    device: str, ops: list[str] | None = None, dtypes: list[str] | None = None, shapes: list[str] | None = None
) -> list[list[BenchArm]]:
    """The cases of all op modules (or of those named), each a list of arms, the most quoted first. ``shapes``: those of
    `shape_of`; ValueError names what there is instead of one that no case has."""
    cases: dict[tuple[str, str], list[BenchArm]] = {}
    for op in known(ops, MODULES):
        for dtype in dtypes or DTYPES:
            for arm in import_module(MODULES[op]).ARMS[op](device, dtype):
                cases.setdefault((arm.op, arm.case), []).append(arm)
    there = {shape_of(case): None for _, case in cases}
    for shape in set(shapes or ()) - there.keys():
        raise ValueError(f"no case of these ops has the shape {shape!r} on {device}; one of {', '.join(there)}")
    first = sorted(cases, key=lambda key: (key != HEADLINE, not key[1].startswith("bf16 ")))
    return [cases[key] for key in first if not shapes or shape_of(key[1]) in shapes]


def shape_of(case: str) -> str:
    """ "8192x50304" of "bf16 8192x50304", "gpt2-124m" of "fp32 gpt2-124m gradients"."""
    words = case.split()[1:]
    return next((word for word in words if word.replace("x", "").isdecimal() and "x" in word), words[0])


def run(cases: list[list[BenchArm]], device: str, pairs: int = PAIRS) -> Iterator[BenchRow]:
    """Bench these cases on `device` ("cuda" or "cpu"), one row per arm, as they are measured."""
    samples = cuda_samples() if device == "cuda" else cpu_samples
    for arms in cases:
        yield from _run_case(arms, samples, device, pairs)


def unmeasured(device: str, **asked: list[str] | None) -> Iterator[BenchRow]:
    """The rows that a machine with `device` would have filled."""
    for arms in collect(device, **asked):
        for arm in arms:
            yield BenchRow(arm.op, arm.case, arm.name, device, "unmeasured", bytes_moved=arm.bytes_moved or None)


def machine(device: str) -> dict:
    """Facts of the machine that a figure is worth nothing without."""
    import torch

    facts = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    else:
        facts |= {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return facts


def _driver() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _run_case(arms: list[BenchArm], samples: Sampling, device: str, pairs: int) -> Iterator[BenchRow]:
    ours = arms[0]
    calls, failures = {}, {}
    for arm in arms:
        try:
            calls[arm.name] = arm.setup()
            for _ in range(WARM_UP):
                calls[arm.name]()
        except Exception as e:  # a missing library or out of memory fails this arm, never the bench
            calls.pop(arm.name, None)
            failures[arm.name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]
    if ours.name in calls:
        calls["again"] = calls[ours.name]
        if ours.bytes_moved:
            calls["copy"] = _copy(ours.bytes_moved, device)
    times = _interleave(calls, ours.name, samples, pairs) if ours.name in calls else {}
    sizes = {arm.name: arm.bytes_moved for arm in arms} | {"again": ours.bytes_moved, "copy": ours.bytes_moved}
    for name in [*(arm.name for arm in arms), "again", "copy"]:
        if name in failures or (name not in times and name not in ("again", "copy")):
            note = failures.get(name, f"{ours.name} failed")
            yield BenchRow(ours.op, ours.case, name, device, "failed", note=note)
        elif name in times:
            yield _row(ours, name, sizes[name], times, device)
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # the next case may need it all


def _row(ours: BenchArm, name: str, bytes_moved: int, times: dict, device: str) -> BenchRow:
    """times[name]: list of (our time, its time) pairs; for ours itself, against the copy (or itself)."""
    pairs = times[name]
    time_s = median([theirs for _, theirs in pairs])
    values = {"time_s": time_s, "pairs": len(pairs), "bytes_moved": bytes_moved or None}
    if bytes_moved:
        values["bytes_per_s"] = bytes_moved / time_s
    if name == ours.name:
        if "copy" in times:
            share = median_interval([copy / our for our, copy in times["copy"]])
            values |= dict(zip(("share_of_copy", "share_of_copy_low", "share_of_copy_high"), share, strict=True))
    else:
        ratio = median_interval([theirs / our for our, theirs in pairs])
        values |= dict(zip(("time_over_ours", "time_over_ours_low", "time_over_ours_high"), ratio, strict=True))
    return BenchRow(ours.op, ours.case, name, device, "measured", **values)


def _interleave(calls: dict, ours: str, samples: Sampling, pairs: int) -> dict[str, list[tuple[float, float]]]:
    """Pairs of times (ours, other) per other arm, taken A B B A, going round the arms so that drift is shared."""
    times: dict[str, list] = {name: [] for name in calls if name != ours}
    for _ in range(math.ceil(pairs / 2)):
        for name in times:
            a1, b1, b2, a2 = samples([calls[ours], calls[name], calls[name], calls[ours]])
            times[name] += [(a1, b1), (a2, b2)]
    times[ours] = [(a, a) for name in times for a, _ in times[name]]
    return times


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by order statistics (binomial ranks): no assumption about the distribution."""
    ordered = sorted(values)
    n = len(ordered)
    below = 0.0
    rank = 0  # the largest r with P(Binomial(n, 1/2) < r) <= 2.5 %
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    low = max(0, rank - 1)
    return median(ordered), ordered[low], ordered[n - 1 - low]


def _copy(bytes_moved: int, device: str) -> Callable[[], object]:
    import torch

    source = torch.randn(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


BUSY_CYCLES = 1_000_000
"""About half a millisecond of a GPU: longer than the host needs to queue a sample."""


def cuda_samples() -> Sampling:
    """Times callables with events, each after an L2 flush, with the host running ahead of the device."""
    import torch

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(4 * l2, 2**26), dtype=torch.int8, device="cuda")

    def samples(calls):
        events = []
        for call in calls:
            flush.fill_(1)
            torch.cuda._sleep(BUSY_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    return samples


def cpu_samples(calls: list[Callable]) -> list[float]:
    """Times callables with the host's clock."""
    return [timeit(call, number=1) for call in calls]
