"""The checker finds each fault that is planted, and nothing in sound traces."""

import pytest

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
