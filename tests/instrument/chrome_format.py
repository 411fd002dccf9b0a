"""The rules of the Chrome trace event format, as far as Perfetto and our files need them. Torch-free.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (the format) and
https://perfetto.dev/docs/getting-started/other-formats (what Perfetto reads of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

REQUIRED = {
    "X": ("name", "ts", "dur", "pid", "tid"),
    "C": ("name", "ts", "pid", "args"),
    "i": ("name", "ts", "s"),
    "s": ("name", "cat", "id", "ts", "pid", "tid"),
    "t": ("name", "cat", "id", "ts", "pid", "tid"),
    "f": ("name", "cat", "id", "ts", "pid", "tid"),
    "M": ("name", "pid", "args"),
    "B": ("name", "ts", "pid", "tid"),
    "E": ("ts", "pid", "tid"),
}
"""Fields without which an event of that ``ph`` is dropped or misplaced."""


def violations(trace: dict[str, Any]) -> list[str]:
    """Every broken rule of a decoded trace in one sentence each, with the event's index; empty when sound."""
    events = trace.get("traceEvents")
    if not isinstance(events, list):
        return ["traceEvents is not a list"]
    return [
        *(problem for index, event in enumerate(events) for problem in _event(index, event)),
        *_flow_pairs(events),
        *_nesting(events),
    ]


def _event(index: int, event: Any) -> Iterator[str]:
    if not isinstance(event, dict):
        yield f"event {index} is no object"
        return
    kind = event.get("ph")
    if kind not in REQUIRED:
        yield f"event {index} has ph {kind!r}"
        return
    where = f"event {index} ({kind} {event.get('name')!r})"
    missing = [field for field in REQUIRED[kind] if event.get(field) is None]
    if missing:
        yield f"{where} lacks {', '.join(missing)}"
        return
    for field in ("ts", "dur"):
        value = event.get(field)
        if value is not None and (not _is_number(value) or value < 0):
            yield f"{where} has {field} {value!r}"
    if kind == "C" and not (isinstance(event["args"], dict) and event["args"] and all(map(_is_number, event["args"].values()))):
        yield f"{where} has values that are not finite numbers: {event['args']!r}"
    if kind == "i" and event["s"] not in ("g", "p", "t"):
        yield f"{where} has scope {event['s']!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _flow_pairs(events: list[Any]) -> Iterator[str]:
    """A flow is one start and at least one end of the same category, name and id, none before the start."""
    starts: dict[tuple, float] = {}
    ends: dict[tuple, list[float]] = {}
    for event in events:
        if isinstance(event, dict) and event.get("ph") in ("s", "f") and _is_number(event.get("ts")):
            key = (event.get("cat"), event.get("name"), event.get("id"))
            if event["ph"] == "f":
                ends.setdefault(key, []).append(event["ts"])
            elif key in starts:
                yield f"flow {key} starts twice"
            else:
                starts[key] = event["ts"]
    for key in starts.keys() | ends.keys():
        if key not in ends or key not in starts:
            yield f"flow {key} has no {'end' if key in starts else 'start'}"
        elif min(ends[key]) < starts[key]:
            yield f"flow {key} ends before it starts"


def _nesting(events: list[Any], tolerance_us: float = 1e-2) -> Iterator[str]:
    """Slices of one thread nest or follow each other; Perfetto drops one that overlaps in part.

    ``tolerance_us``: torch writes times in rounded microseconds.
    """
    threads: dict[tuple, list[tuple[float, float, str]]] = {}
    for event in events:
        if isinstance(event, dict) and event.get("ph") == "X" and _is_number(event.get("ts")) and _is_number(event.get("dur")):
            slice_ = (event["ts"], event["dur"], event.get("name", ""))
            threads.setdefault((event.get("pid"), event.get("tid")), []).append(slice_)
    for thread, slices in threads.items():
        open_ends: list[tuple[float, str]] = []
        for ts, dur, name in sorted(slices, key=lambda entry: (entry[0], -entry[1])):
            while open_ends and open_ends[-1][0] <= ts + tolerance_us:
                open_ends.pop()
            if open_ends and ts + dur > open_ends[-1][0] + tolerance_us:
                yield f"on thread {thread}, {name!r} at {ts} overlaps {open_ends[-1][1]!r} in part"
            open_ends.append((ts + dur, name))
