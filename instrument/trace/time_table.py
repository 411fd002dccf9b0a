"""Seconds by kernel class and phase, from the events of a profiler trace. Pure functions; torch-free.

On CUDA the durations are the kernels' own, and a kernel belongs to the phase in which it was launched. On a CPU they are the
self times of ops: an op's time without that of the ops in it. An op within ``scaled_dot_product_attention`` is attention, its
backward too (found by autograd's sequence number); all that ``optimizer.step`` runs is optimizer; whatever else is classed by
name, and a helper without a class of its own counts as what called it. All of it ran under the profiler, which lengthens short
ops: shares are worth more than seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from instrument.kernel_classes import CLASSES, kernel_class

PHASE_PREFIX = "ddb.phase."
WINDOW = "ddb.window"
OUTSIDE = "outside"
"""The phase of what runs between phases."""
ENGINE = "autograd::engine::evaluate_function: "
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
PARENTS = ("Optimizer.step#", "ddb.ours")
"""Annotations that say what the ops in them are for; their own time counts for nothing."""
_PREVAIL = ("attention", "optimizer", "ours")
"""Classes that everything inside an op of theirs has."""


@dataclass
class _Op:
    """An op of a host thread, in microseconds."""

    event: dict[str, Any]
    start_us: float
    end_us: float
    parent: _Op | None = None
    children_us: float = 0.0
    kind: str = "other"

    @property
    def name(self) -> str:
        return self.event["name"].removeprefix(ENGINE)

    @property
    def self_us(self) -> float:
        return max(0.0, self.end_us - self.start_us - self.children_us)


@dataclass
class _Spent:
    """Time of one kernel or op: what the table adds up."""

    name: str
    kind: str
    phase: str
    start_us: float
    end_us: float
    spent_us: float
    args: dict[str, Any] = field(default_factory=dict)


def time_table(events: Iterable[dict[str, Any]], *, top: int = 20) -> dict[str, Any]:
    """The table of a trace's ``traceEvents``.

    ``seconds[class][phase]`` adds up to ``sum_s``. ``busy_s`` is the time during which at least one of them ran, so ``overlap_s
    = sum_s - busy_s`` ran beside another (streams, threads), and ``idle_s = wall_s - busy_s`` had none running: launches,
    Python, waiting. ``wall_s`` is the window's, or null in a trace without the mark of one. ``phase_wall_s`` is the host's.
    """
    complete = [e for e in events if e.get("ph") == "X" and isinstance(e.get("dur"), (int, float))]
    phases = _Phases(complete)
    ops = _host_ops(complete)
    device = [e for e in complete if e.get("cat") in DEVICE_CATEGORIES]
    spent = _device_time(device, complete, ops, phases) if device else _host_time(ops, phases)
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in spent:
        seconds[part.kind][part.phase] += part.spent_us / 1e6
    sum_s, busy_s = sum(part.spent_us for part in spent) / 1e6, _union_us(spent) / 1e6
    window = next((e for e in complete if e["name"] == WINDOW and e.get("cat") == "user_annotation"), None)
    wall_s = window["dur"] / 1e6 if window else None
    return {
        "source": "cuda_kernel_durations" if device else "cpu_self_time",
        "wall_s": wall_s,
        "sum_s": sum_s,
        "busy_s": busy_s,
        "overlap_s": sum_s - busy_s,
        "idle_s": None if wall_s is None else wall_s - busy_s,
        "seconds": {kind: dict(seconds[kind]) for kind in CLASSES if kind in seconds},
        "phase_wall_s": phases.wall_s(),
        "top": _largest(spent, top),
    }


class _Phases:
    """When the host was in which phase."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._slices = sorted(
            (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PHASE_PREFIX))
            for e in events
            if e.get("cat") == "user_annotation" and e["name"].startswith(PHASE_PREFIX)
        )
        self._starts = [start for start, *_ in self._slices]

    def at(self, time_us: float) -> str:
        """The phase at a time of the host, on any thread: the backward pass has its own."""
        index = bisect_right(self._starts, time_us) - 1
        return self._slices[index][2] if index >= 0 and time_us <= self._slices[index][1] else OUTSIDE

    def wall_s(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for start, end, name in self._slices:
            total[name] += (end - start) / 1e6
        return dict(total)


def _host_ops(events: list[dict[str, Any]]) -> list[_Op]:
    """All ops with parents and classes, by thread and time."""
    threads: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" or event["name"].startswith(PARENTS):
            threads[event["pid"], event["tid"]].append(event)
    ops = [op for thread in threads.values() for op in _nested(thread)]
    attention = {_sequence(op) for op in ops if kernel_class(op.name) == "attention" or _inside(op, "attention")} - {None}
    for op in ops:  # parents come before their children
        op.kind = _class_of(op, attention)
    return ops


def _nested(events: list[dict[str, Any]]) -> list[_Op]:
    """One thread's ops, each under the innermost that contains its start."""
    ops: list[_Op] = []
    running: list[_Op] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        op = _Op(event, event["ts"], event["ts"] + event["dur"])
        while running and running[-1].end_us <= op.start_us:
            running.pop()
        if running:
            op.parent = running[-1]
            op.end_us = min(op.end_us, op.parent.end_us)  # rounded times may stick out by a nanosecond
            op.parent.children_us += op.end_us - op.start_us
        running.append(op)
        ops.append(op)
    return ops


def _inside(op: _Op, kind: str) -> bool:
    while op.parent is not None:
        op = op.parent
        if kernel_class(op.name) == kind:
            return True
    return False


def _sequence(op: _Op) -> int | None:
    """The number that links an op of the forward pass with its backward."""
    arguments = op.event.get("args", {})
    number = arguments.get("Sequence number")
    return None if number is None or number < 0 or arguments.get("Fwd thread id") else number


def _class_of(op: _Op, attention: set[int]) -> str:
    above = op.parent.kind if op.parent is not None else "other"
    if above in _PREVAIL:
        return above
    if op.event["name"].startswith(ENGINE) and op.event.get("args", {}).get("Sequence number") in attention:
        return "attention"
    own = kernel_class(op.name)
    return above if own == "other" else own


def _host_time(ops: list[_Op], phases: _Phases) -> list[_Spent]:
    return [
        _Spent(op.name, op.kind, phases.at(op.start_us), op.start_us, op.end_us, op.self_us, op.event.get("args", {}))
        for op in ops
        if op.event.get("cat") == "cpu_op"
    ]


def _device_time(kernels: list[dict[str, Any]], events: list[dict[str, Any]], ops: list[_Op], phases: _Phases) -> list[_Spent]:
    """Kernels with the phase of their launch and the class of the op that launched them, where names say less."""
    launched_us = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in LAUNCH_CATEGORIES and "correlation" in e.get("args", {})
    }
    by_external_id = {op.event["args"]["External id"]: op for op in ops if "External id" in op.event.get("args", {})}
    spent = []
    for kernel in kernels:
        arguments = kernel.get("args", {})
        op = by_external_id.get(arguments.get("External id"))
        launch_us = launched_us.get(arguments.get("correlation"))
        kind = kernel_class(kernel["name"])
        if op is not None and (op.kind in _PREVAIL or kind == "other"):
            kind = op.kind
        phase, end_us = OUTSIDE if launch_us is None else phases.at(launch_us), kernel["ts"] + kernel["dur"]
        args = op.event.get("args", {}) if op else {}
        spent.append(_Spent(kernel["name"], kind, phase, kernel["ts"], end_us, kernel["dur"], args))
    return spent


def _union_us(spent: list[_Spent]) -> float:
    """Time during which at least one ran."""
    total_us, until_us = 0.0, float("-inf")
    for part in sorted(spent, key=lambda part: part.start_us):
        total_us += max(0.0, part.end_us - max(part.start_us, until_us))
        until_us = max(until_us, part.end_us)
    return total_us


def _largest(spent: list[_Spent], top: int) -> list[dict[str, Any]]:
    """The kernels or ops that took longest, by name, phase, shapes and dtypes."""
    rows: dict[tuple, dict[str, Any]] = {}
    for part in spent:
        shapes, dtypes = _inputs(part.args)
        row = {"name": part.name, "class": part.kind, "phase": part.phase, "count": 0, "total_s": 0.0}
        row |= {"input_shapes": shapes, "input_dtypes": dtypes}
        row = rows.setdefault((part.name, part.phase, part.kind, str(shapes), str(dtypes)), row)
        row["count"] += 1
        row["total_s"] += part.spent_us / 1e6
    return sorted(rows.values(), key=lambda row: -row["total_s"])[:top]


def _inputs(arguments: dict[str, Any]) -> tuple[list | None, list[str] | None]:
    """Shapes and dtypes of an op's tensors; null where the trace has none."""
    shapes, kinds = arguments.get("Input Dims"), arguments.get("Input type")
    if shapes is None or kinds is None:
        return None, None
    no_tensors = ("", "Scalar", "ScalarList", "None")
    tensors = [(shape, kind) for shape, kind in zip(shapes, kinds, strict=False) if kind not in no_tensors]
    return [shape for shape, _ in tensors], [kind for _, kind in tensors]
