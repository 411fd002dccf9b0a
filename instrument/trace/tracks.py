"""Our own tracks of a trace, as Chrome/Perfetto JSON events. Plain data in, plain data out; torch-free.

Times are unix nanoseconds; the file's are microseconds since its ``baseTimeNanoseconds``. The format
drops counter values that are not finite numbers: a sample loses that value and gets a marker instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PID = 1_000_000_000
"""Our process in the trace: above any pid_max of Linux (2^22), so no real process shares it."""
PROCESS_NAME = "Datatype Dynamics Bench"
PHASE_TID, FLOW_TID, MARKER_TID = 1, 2, 3
THREAD_NAMES = {PHASE_TID: "phases", FLOW_TID: "non-finite values", MARKER_TID: "markers"}
POINT_US = 1.0
"""How long a point in time is drawn, where the format needs a slice to hold on to."""


@dataclass(frozen=True)
class CounterSample:
    """Largest |x| of a module's output (``fwd``) and of its gradient (``bwd``) at a time."""

    unix_ns: int
    name: str
    fwd: float | None = None
    bwd: float | None = None

    @property
    def is_finite(self) -> bool:
        return all(value is None or math.isfinite(value) for value in (self.fwd, self.bwd))

    def events(self, base_ns: int) -> list[dict[str, Any]]:
        values = {key: value for key, value in (("fwd", self.fwd), ("bwd", self.bwd)) if value is not None}
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        lost = {key: str(value) for key, value in values.items() if key not in finite}
        events = [_event("C", 0, f"absmax {self.name}", (self.unix_ns, base_ns), args=finite)] if finite else []
        return events + (Marker(self.unix_ns, f"absmax {self.name} is not finite", lost).events(base_ns) if lost else [])


@dataclass(frozen=True)
class Marker:
    """A moment with a name: the overflow, a skipped step. ``detail`` is shown when it is clicked."""

    unix_ns: int
    name: str
    detail: dict[str, Any] = field(default_factory=dict)

    def events(self, base_ns: int) -> list[dict[str, Any]]:
        return [_event("i", MARKER_TID, self.name, (self.unix_ns, base_ns), s="p", cat="ddb", args=dict(self.detail))]


@dataclass(frozen=True)
class PhaseSlice:
    """A phase of a step: forward, loss, backward, unscale, clip or optimizer."""

    name: str
    start_unix_ns: int
    end_unix_ns: int
    step: int | None = None

    def events(self, base_ns: int) -> list[dict[str, Any]]:
        if self.end_unix_ns < self.start_unix_ns:
            raise ValueError(f"phase {self.name} of step {self.step} ends before it starts")
        dur_us = (self.end_unix_ns - self.start_unix_ns) / 1e3
        args = {} if self.step is None else {"step": self.step}
        return [_event("X", PHASE_TID, self.name, (self.start_unix_ns, base_ns), cat="ddb.phase", dur=dur_us, args=args)]


@dataclass(frozen=True)
class Flow:
    """A non-finite value on its way from the module that produced it to one it spread to."""

    producer: str
    from_unix_ns: int
    propagator: str
    to_unix_ns: int


def events_of(ours: Iterable[CounterSample | Marker | PhaseSlice | Flow], base_ns: int) -> list[dict[str, Any]]:
    """Trace events in the order of their times, metadata first."""
    ours = list(ours)
    events = [event for one in ours if not isinstance(one, Flow) for event in one.events(base_ns)]
    events += _flows([one for one in ours if isinstance(one, Flow)], base_ns)
    return [*_names(), *sorted(events, key=lambda event: event["ts"])] if events else []


def _event(ph: str, tid: int, name: str, at: tuple[int, int], **more: Any) -> dict[str, Any]:
    """One event of ours; ``at``: its unix time and the trace's base, both in nanoseconds."""
    unix_ns, base_ns = at
    return {"ph": ph, "pid": PID, "tid": tid, "ts": (unix_ns - base_ns) / 1e3, "name": name, **more}


def _names() -> list[dict[str, Any]]:
    named = [("process_name", 0, {"name": PROCESS_NAME}), ("process_sort_index", 0, {"sort_index": -1})]
    named += [("thread_name", tid, {"name": name}) for tid, name in THREAD_NAMES.items()]
    return [{"ph": "M", "name": name, "pid": PID, "tid": tid, "args": args} for name, tid, args in named]


def _flows(flows: Sequence[Flow], base_ns: int) -> list[dict[str, Any]]:
    """Arrows hold on to slices, so each end gets a short one, which ends half way to the next: a viewer reads a time as a
    double of microseconds, three months of which round to a nanosecond, and drops a slice that begins in another."""
    times_ns = sorted({unix_ns for flow in flows for unix_ns in (flow.from_unix_ns, flow.to_unix_ns)})
    dur_us = {now: min(POINT_US, (following - now) / 2e3) for now, following in pairwise(times_ns)}
    ends: dict[tuple[str, int], dict[str, Any]] = {}
    arrows = []
    for number, flow in enumerate(flows, start=1):
        if flow.to_unix_ns < flow.from_unix_ns:
            raise ValueError(f"the flow from {flow.producer} to {flow.propagator} ends before it starts")
        for letter, module, unix_ns in (("s", flow.producer, flow.from_unix_ns), ("f", flow.propagator, flow.to_unix_ns)):
            end, at = (module, unix_ns), (unix_ns, base_ns)
            duration_us = dur_us.get(unix_ns, POINT_US)
            ends.setdefault(end, _event("X", FLOW_TID, module, at, cat="ddb.flow", dur=duration_us, args={}))
            bound = {"bp": "e"} if letter == "f" else {}
            arrows.append(_event(letter, FLOW_TID, "non-finite", at, cat="ddb.flow", id=number, **bound))
    return [*ends.values(), *arrows]
