"""Our tracks keep the trace format's rules whatever the numbers, and the checker of those rules finds each planted fault."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.trace.tracks import PID, CounterSample, Flow, Marker, PhaseSlice, events_of
from tests.instrument.chrome_format import violations


def slice_(name, ts, dur, tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


def flow(letter, ts, number=1):
    return {"ph": letter, "name": "f", "cat": "c", "id": number, "ts": ts, "pid": 1, "tid": 1}


SOUND = [
    slice_("a", 0, 10),
    slice_("in a", 2, 3),
    slice_("after", 10, 1),
    slice_("elsewhere", 5, 10, tid=2),
    {"ph": "C", "name": "n", "ts": 1, "pid": 1, "args": {"fwd": 1.5}},
    {"ph": "i", "name": "now", "ts": 3, "s": "p"},
    flow("s", 1),
    flow("f", 4),
    flow("s", 1, 2),
    flow("f", 2, 2),
    flow("f", 3, 2),
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "p"}},
]


def test_a_sound_trace_breaks_no_rule():
    assert violations({"traceEvents": SOUND}) == []


@pytest.mark.parametrize(
    "planted, complaint",
    [
        (7, "is no object"),
        ({"ph": "Q"}, "has ph 'Q'"),
        ({"ph": "X", "name": "a", "ts": 1, "pid": 1, "tid": 1}, "lacks dur"),
        ({"ph": "C", "name": "n", "ts": 1, "args": {"fwd": 1}}, "lacks pid"),
        (slice_("a", -1, 2), "has ts -1"),
        (slice_("a", 30, -2), "has dur -2"),
        (slice_("a", float("nan"), 1), "has ts nan"),
        (slice_("a", "1", 1), "has ts '1'"),
        ({"ph": "C", "name": "n", "ts": 1, "pid": 1, "args": {"fwd": float("inf")}}, "not finite numbers"),
        ({"ph": "C", "name": "n", "ts": 1, "pid": 1, "args": {"fwd": "1"}}, "not finite numbers"),
        ({"ph": "C", "name": "n", "ts": 1, "pid": 1, "args": {}}, "not finite numbers"),
        ({"ph": "i", "name": "now", "ts": 3, "s": "q"}, "scope 'q'"),
        (flow("s", 1), "starts twice"),
        (flow("s", 1, 9), "has no end"),
        (flow("f", 1, 9), "has no start"),
        (flow("f", 0.5), "ends before it starts"),
        (slice_("across", 5, 10), "overlaps 'a' in part"),
    ],
)
def test_a_planted_fault_is_found(planted, complaint):
    found = violations({"traceEvents": [*SOUND, planted]})
    assert len(found) >= 1 and any(complaint in problem for problem in found), found


def test_what_is_no_trace_is_said_to_be():
    assert violations({}) == ["traceEvents is not a list"]


BASE_NS = 1_790_857_026_000_000_000
times_ns = st.integers(BASE_NS, BASE_NS + 10**16)
names = st.text(max_size=8)
values = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def flows(draw):
    start = draw(times_ns)
    return Flow(draw(names), start, draw(names), start + draw(st.integers(0, 5_000)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(CounterSample, times_ns, names, values, values)),
    st.lists(st.builds(Marker, times_ns, names)),
    st.lists(flows(), max_size=8),
)
def test_any_tracks_make_a_sound_trace(counters, markers, arrows):
    events = events_of([*counters, *markers, *arrows], BASE_NS)
    assert violations({"traceEvents": events}) == []
    json.dumps(events, allow_nan=False)
    kept = sum(len(event["args"]) for event in events if event["ph"] == "C")
    lost = sum(len(event["args"]) for event in events if event["ph"] == "i" and "not finite" in event["name"])
    assert kept + lost >= sum(value is not None for sample in counters for value in (sample.fwd, sample.bwd))
    assert kept == sum(value is not None and math.isfinite(value) for sample in counters for value in (sample.fwd, sample.bwd))


def test_times_are_microseconds_since_the_base():
    (event,) = [e for e in events_of([PhaseSlice("forward", BASE_NS + 1_500, BASE_NS + 4_000, 7)], BASE_NS) if e["ph"] == "X"]
    assert (event["ts"], event["dur"], event["name"], event["args"], event["pid"]) == (1.5, 2.5, "forward", {"step": 7}, PID)


def test_a_value_that_is_not_finite_becomes_a_marker():
    events = events_of([CounterSample(BASE_NS, "h.3", fwd=2.0, bwd=math.inf)], BASE_NS)
    assert [e["args"] for e in events if e["ph"] == "C"] == [{"fwd": 2.0}]
    assert [(e["name"], e["args"]) for e in events if e["ph"] == "i"] == [("absmax h.3 is not finite", {"bwd": "inf"})]


def test_arrows_from_one_producer_share_its_slice():
    tracks = [Flow("p", BASE_NS, "q", BASE_NS + 300), Flow("p", BASE_NS, "r", BASE_NS + 900)]
    events = events_of(tracks, BASE_NS)
    assert [e["name"] for e in events if e["ph"] == "X"] == ["p", "q", "r"]
    assert len({e["id"] for e in events if e["ph"] == "s"}) == 2
    assert all(e["bp"] == "e" for e in events if e["ph"] == "f")


@pytest.mark.parametrize("since_base_ns", [0, 4_431_377_654_513_444, 7_800_000_000_000_001])
def test_the_ends_of_arrows_never_touch_however_far_the_base_is(since_base_ns):
    """Torch's base may lie three months back: there a double of microseconds is exact to a nanosecond, and Perfetto drops a
    slice that begins a nanosecond before the last one's end."""
    start = BASE_NS + since_base_ns
    slices = [e for e in events_of([Flow("p", start, "q", start + 300)], BASE_NS) if e["ph"] == "X"]
    (first, second), ulp_us = slices, math.ulp(since_base_ns / 1e3)
    assert first["name"] == "p" and 0 < first["dur"] < second["ts"] - first["ts"] - 4 * ulp_us


def test_what_runs_backwards_is_refused():
    with pytest.raises(ValueError, match="ends before it starts"):
        events_of([PhaseSlice("loss", 2, 1)], 0)
    with pytest.raises(ValueError, match="from a to b ends before"):
        events_of([Flow("a", 2, "b", 1)], 0)


def test_nothing_gives_no_tracks():
    assert events_of([], BASE_NS) == []
