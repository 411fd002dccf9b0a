"""The instruments' cost, from a benchmark's file made by hand (SIMULATED), to the ratios and the picture."""

import json

import numpy as np
import pytest

from instrument.results.contents import load
from report.dossier.measurements import overhead_rows
from report.plots.registry import DRAW
from report.plots.style import theme
from report.tables import overhead

ROUNDS = 12


def document(**changes):
    """The shape of ``harness bench overhead``: light costs 2 %, full 10 %."""
    bare = 0.1 + 0.001 * np.sin(np.arange(ROUNDS))
    arms = {"bare": bare, "bare_again": bare, "light": 1.02 * bare, "full": 1.1 * bare}
    rows = [
        {
            "bench": "overhead",
            "name": name + kind,
            "unit": "ratio",
            "n": ROUNDS,
            "median": ratio,
            "low95": ratio - 0.01,
            "high95": ratio + 0.01,
            "at_most": 1.03 if name + kind == "light" else None,
            "note": "",
        }
        for kind in ("", "_cpu")
        for name, ratio in (("bare_again", 1.0), ("light", 1.02), ("full", 1.1))
    ]
    rows.insert(0, {"name": "bare_step_s", "unit": "s", "median": 0.1})
    return {
        "device": "cpu",
        "pairs": ROUNDS,
        "what": "hand-made",
        "simulated": True,
        "rows": rows,
        "wall_s": {name: list(values) for name, values in arms.items()},
        "cpu_s": {},
    } | changes


@pytest.fixture
def place(plant):
    return plant(("gpt2_clm",), ("fp32_true",), (0,)).path


def table_of(place, content):
    (place / "overhead.json").write_text(json.dumps(content))
    return overhead.table(load(place))


def test_ratios_are_to_the_bare_step_of_the_same_round(place):
    table = table_of(place, document())
    assert table.marks == ("CPU", "SIMULATED") and table.empty is None
    light = table.data[table.data["arm"] == "light"]
    assert len(light) == ROUNDS and light["ratio"].to_numpy() == pytest.approx(1.02)
    assert table.title.startswith("A step takes 1.020 [1.010, 1.030] times as long with light, 1.100 [1.090, 1.110]")


def test_the_table_sets_processor_time_beside_the_clock_and_the_aim(place):
    rows = {row[0]: row[1:] for row in overhead_rows(table_of(place, document()).summary)}
    assert rows["light"][:4] == ["1.020 [1.010, 1.030]", "1.020 [1.010, 1.030]", "at most 1.03", "met"]
    assert rows["full"][2:4] == ["none", "–"] and set(rows) == {"bare_again", "light", "full"}


def test_a_missed_aim_and_an_unresolved_cost_are_said(place):
    rows = document()["rows"]
    slow = [row | {"median": 1.2, "low95": 0.9, "high95": 1.5} if row["name"] == "light" else row for row in rows]
    table = table_of(place, document(rows=slow))
    assert "1.200 [0.900, 1.500] times as long with light (not resolved from 1)" in table.title
    assert next(row for row in overhead_rows(table.summary) if row[0] == "light")[4] == "missed"


def test_the_picture_shows_three_arms_and_their_medians(place):
    table = table_of(place, document())
    with theme(table.name):
        figure = DRAW["overhead"](table)
        figure.draw_without_rendering()
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"bare", "light", "full", "1.020", "1.100"} <= set(words)
    lines = {tuple(np.round(line.get_ydata()[:2], 4)) for line in figure.axes[0].lines}
    assert (100.0, 100.8415) in lines and (102.0, 102.8583) in lines


def test_without_the_file_it_is_not_measured(place):
    table = overhead.table(load(place))
    assert "not measured: overhead.json" in table.empty and overhead_rows(table.summary) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": None, "wall_s": None},
        {"rows": "x", "wall_s": {"bare": "x", "light": [1]}},
        {"rows": [3, {"unit": "ratio"}]},
        {"rows": [{"unit": "ratio", "name": "light", "median": "1"}], "wall_s": {"bare": [0.1, None], "light": [0, "x"]}},
    ],
)
def test_what_is_no_figure_is_left_out(place, changes):
    table = table_of(place, document(**changes))
    overhead_rows(table.summary)
    with theme(table.name):
        DRAW["overhead"](table).draw_without_rendering()
    assert not np.isinf(table.data.get("ratio", np.zeros(1)).to_numpy(float) if len(table.data) else np.zeros(1)).any()
