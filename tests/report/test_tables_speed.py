"""B, C, F, H and the instruments' cost: intervals by hand, text for runs without a speed, frontiers, padding, ranks."""

import json
import math

import msgspec
import numpy as np
import pytest
from scipy import stats

from instrument.results.contents import load
from report.dossier.measurements import overhead_rows
from report.plots.draw import draw
from report.plots.style import theme
from report.tables import b_efficiency, c_throughput, d_grad_norm, f_padding, h_rank
from report.tables.machine import overhead
from report.tables.selection import select
from report.tables.speed import eligible, pooled_rate

CONFIGS = ("fp32_true", "amp_bf16", "bf16_pure")
SPEEDS = {"amp_bf16": 2.0, "bf16_pure": 3.0, "amp_fp16": 1.8, "amp_bf16_8bit": 1.5}


def fast(case, config, seed):
    return {"speed": SPEEDS.get(config, 1.0)}


def rows(table):
    return table.data.set_index(["case", "dtype_config"])


def test_relative_speed_is_the_paired_log_ratio_by_hand(plant):
    folder = plant(("gpt2_clm",), CONFIGS, change=fast)
    row = rows(c_throughput.table(folder)).loc[("gpt2_clm", "amp_bf16")]
    speed = {(r.dtype_config, r.seed): r.samples_per_s for r in folder.runs}
    logs = [math.log(speed["amp_bf16", s] / speed["fp32_true", s]) for s in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(logs), stats.sem(logs))
    assert (row["relative"], row["low"], row["high"]) == pytest.approx((math.exp(np.mean(logs)), math.exp(low), math.exp(high)))
    assert row["n"] == 3 and row["samples_per_s"] == pytest.approx(stats.hmean([speed["amp_bf16", s] for s in range(3)]))


def test_rates_are_pooled_total_over_total():
    assert pooled_rate([1.0, 3.0]) == pytest.approx(1.5)  # 2 batches in 1 + 1/3 of the time, not 2 a second


def test_one_seed_has_a_dot_without_interval(plant):
    table = c_throughput.table(plant(("gpt2_clm",), CONFIGS, (0,), fast))
    row = rows(table).loc[("gpt2_clm", "amp_bf16")]
    assert row["relative"] == pytest.approx(2.0, rel=0.01) and math.isnan(row["low"]) and "one seed" in table.title


def test_the_reference_is_one_without_interval(plant):
    row = rows(c_throughput.table(plant(("gpt2_clm",), CONFIGS))).loc[("gpt2_clm", "fp32_true")]
    assert row["relative"] == 1.0 and math.isnan(row["low"])


def test_a_dead_run_is_a_word_and_no_bar(plant):
    table = c_throughput.table(
        plant(("gpt2_clm",), CONFIGS, change=lambda case, config, seed: {"diverges_at": 55} if config == "bf16_pure" else {})
    )
    row = rows(table).loc[("gpt2_clm", "bf16_pure")]
    assert row["word"] == "NaN @ 55" and math.isnan(row["relative"]) and row["n"] == 0
    assert {reason for _, reason in table.excluded} == {"NaN @ 55"} and len(table.excluded) == 3


@pytest.mark.parametrize(
    ("row", "enters"),
    [
        ({"steps": 55}, True),
        ({"steps": 54}, False),
        ({"steps": 15, "preset": "tiny"}, True),
        ({"steps": 14, "preset": "tiny"}, False),
        ({"flags": {"simulated": True, "hardware": {"throttled": True, "throttle_reasons": ["hw_slowdown"]}}}, False),
        ({"flags": {"simulated": True, "hardware": {"throttled": False}}}, True),
        ({"flags": {"simulated": True, "hardware": {"contended": True}}}, False),
    ],
)
def test_a_run_enters_with_fifty_timed_steps_undisturbed(plant, row, enters):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,), lambda *_: dict(row))
    runs, excluded = eligible(folder, select(folder))
    assert (len(runs) == 1) is enters and len(excluded) == (not enters)
    if "throttled" in str(excluded):
        assert excluded[0][1] == "throttled: hw_slowdown"


def test_speed_without_a_reference_is_shown_and_not_compared(plant):
    table = c_throughput.table(plant(("gpt2_clm",), ("amp_bf16",)))
    row = rows(table).loc[("gpt2_clm", "amp_bf16")]
    assert math.isnan(row["relative"]) and row["samples_per_s"] > 0 and "fp32_true" in row["word"]
    assert table.title.startswith("Not decided")


def test_the_frontier_keeps_ties_and_drops_the_dominated(plant):
    memory = {"fp32_true": 9, "amp_bf16": 5, "bf16_pure": 5, "amp_fp16": 7, "amp_bf16_8bit": 4}

    def change(case, config, seed):
        mfu = {"fp32_true": 0.1, "amp_bf16": 0.3, "bf16_pure": 0.3, "amp_fp16": 0.2, "amp_bf16_8bit": 0.2}[config]
        return {"peak_allocated_bytes": memory[config] * 10**9, "mfu": mfu, "speed": 1.0, "mfu_bf16_peak": mfu}

    table = b_efficiency.table(plant(("gpt2_clm",), tuple(memory), change=change))
    on = table.data[table.data["on_frontier"]]["dtype_config"].tolist()
    assert on == ["amp_bf16", "bf16_pure", "amp_bf16_8bit"]  # equal in both, and the leanest
    assert table.data["peak_kind"].unique().tolist() == ["allocated"] and table.empty is None


def test_a_poor_configuration_is_never_on_the_frontier(plant):
    folder = plant(
        ("gpt2_clm",),
        CONFIGS,
        change=lambda case, config, seed: {"speed": SPEEDS.get(config, 1.0), "gap": 4.0 * (config == "bf16_pure")},
    )
    data = rows(b_efficiency.table(folder))
    assert not data.loc[("gpt2_clm", "bf16_pure"), "on_frontier"] and data.loc[("gpt2_clm", "amp_bf16"), "on_frontier"]


def test_without_mfu_there_is_no_efficiency_and_the_reason_is_said(plant):
    table = b_efficiency.table(plant(("gpt2_clm",), CONFIGS, change=lambda *_: {"mfu": None}))
    assert table.data.empty and "not measured" in table.empty and table.title.startswith("Not decided")


def test_the_padding_tax_is_the_share_of_work_that_was_padding(plant):
    folder = plant(
        ("gpt2_clm", "gpt2_multi_cls"),
        ("fp32_true", "amp_bf16"),
        change=lambda case, config, seed: {"real": 0.6 if "cls" in case else 1.0},
    )
    table = f_padding.table(folder)
    summary = table.summary.set_index(["case", "seed"])
    columns = folder.steps("gpt2_multi_cls-amp_bf16-s0-0badcafe")
    timed = columns["step"] > 5
    expected = 1 - columns["real_tokens"][timed].sum() / columns["tokens"][timed].sum()
    assert summary.loc[("gpt2_multi_cls", 0), "tax"] == pytest.approx(expected, abs=0.002)
    assert summary.loc[("gpt2_clm", 0), "tax"] == pytest.approx(0.0, abs=1e-12)
    assert summary.loc[("gpt2_multi_cls", 0), "cv_real"] > summary.loc[("gpt2_clm", 0), "cv_real"]
    assert set(table.data["dtype_config"]) == {"amp_bf16"}


def test_batches_are_sorted_by_real_tokens(plant):
    table = f_padding.table(plant(("gpt2_multi_cls",), ("fp32_true",), change=lambda *_: {"real": 0.5}))
    for _, run in table.data.groupby("seed"):
        assert (np.diff(run["real_tokens"]) >= 0).all() and run["order"].tolist() == list(range(55))
        assert run["real_tokens"].nunique() > 10


def test_padding_falls_back_to_tokens_per_second_in_the_open(plant):
    table = f_padding.table(plant(("gpt2_multi_cls",), ("fp32_true",), change=lambda *_: {"real": 0.5, "mfu": None}))
    assert set(table.data["y_kind"]) == {"tokens/s"} and table.data["mfu_real"].isna().all()
    assert (table.data["real_tokens_per_s"] < table.data["tokens_per_s"]).all() and "no MFU was measured" in table.caption


def test_bucketed_runs_are_distinguished(plant, add_row):
    folder = plant(("gpt2_multi_cls",), ("fp32_true",), change=lambda *_: {"real": 0.5})
    other = plant(("gpt2_multi_cls",), ("fp32_true",), (0,), lambda *_: {"real": 0.9}, name="bucketed")
    record = other.runs[0]
    renamed = msgspec.structs.replace(
        record, run_id=record.run_id[:-8] + "deadbeef", config=record.config | {"bucket_by_length": True}
    )
    log = (other.path / "training_logs" / f"run_{record.run_id}.jsonl").read_bytes()
    add_row(folder, renamed)
    (folder.path / "training_logs" / f"run_{renamed.run_id}.jsonl").write_bytes(log)
    summary = f_padding.table(load(folder.path)).summary
    assert summary["bucketed"].tolist().count(True) == 1
    assert summary[summary["bucketed"]]["tax"].max() < summary[~summary["bucketed"]]["tax"].min()


BOTH = ("gpt2_clm", "gpt2_multi_cls")


def test_ranks_compare_both_sides_and_leave_controls_out(plant):
    folder = plant(
        BOTH,
        ("fp32_true", "amp_bf16", "bf16_pure", "fp16_naive_eps1e4"),
        change=lambda case, config, seed: {
            "speed": {"amp_bf16": 3.0, "bf16_pure": 2.0}.get(config, 1.0) if case == "gpt2_clm" else SPEEDS.get(config, 1.0)
        },
    )
    table = h_rank.table(folder)
    ranks = table.data.set_index(["side", "dtype_config"])["rank"]
    assert ranks["LM", "amp_bf16"] == 1 and ranks["classification", "bf16_pure"] == 1
    assert "fp16_naive_eps1e4" not in set(table.data["dtype_config"]) and "changes with the task" in table.title
    assert table.summary["tau"].isna().all() and "needs 5" in table.summary["note"].iloc[0] and "tau" not in table.title


def test_a_configuration_that_died_anywhere_is_not_ranked(plant):
    dead = (BOTH[1], "amp_bf16", 2)
    folder = plant(BOTH, CONFIGS, change=lambda *key: fast(*key) | ({"diverges_at": 20} if key == dead else {}))
    assert set(h_rank.table(folder).data["dtype_config"]) == {"fp32_true", "bf16_pure"}


def test_tau_comes_with_five_configurations(plant):
    table = h_rank.table(plant(BOTH, ("fp32_true", *SPEEDS), change=fast))
    summary = table.summary.iloc[0]
    assert "(Kendall's tau 1.00 [" in table.title
    assert summary["tau"] == pytest.approx(1.0) and summary["tau_low"] < 0.7


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
    return overhead(load(place))


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
        figure = draw(table)
        figure.draw_without_rendering()
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"bare", "light", "full", "1.020", "1.100"} <= set(words)
    lines = {tuple(np.round(line.get_ydata()[:2], 4)) for line in figure.axes[0].lines}
    assert (100.0, 100.8415) in lines and (102.0, 102.8583) in lines


def test_without_the_file_it_is_not_measured(place):
    table = overhead(load(place))
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
        draw(table).draw_without_rendering()
    assert not np.isinf(table.data.get("ratio", np.zeros(1)).to_numpy(float) if len(table.data) else np.zeros(1)).any()


def test_titles_carry_what_is_resolved(plant):
    """C calls nothing fast that the seeds do not show to be; B says that some of its cells failed; D counts spikes."""

    def change(case, config, seed):
        scatter = {"amp_bf16": (0.6, 1.9, 1.2)}.get(config, (1.0, 1.0, 1.0))
        return {"speed": scatter[seed % 3]} | ({"diverges_at": 20} if config == "fp16_naive" else {})

    folder = plant(("gpt2_clm",), ("fp32_true", "amp_bf16", "fp16_naive"), change=change)
    assert c_throughput.table(folder).title.startswith("Not resolved: no configuration is shown to be faster than fp32_true")
    assert "1 cell with a failure is not drawn" in b_efficiency.table(folder).title
    counted = "spikes in steps: fp32_true 0 in 150, amp_bf16 0 in 150 and fp16_naive 0 in 30."
    assert d_grad_norm.table(folder).title.endswith(counted)
    quick = plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), change=fast, name="fast")
    assert "amp_bf16 leads at 2.00x (resolved in 1 of 1 case)" in c_throughput.table(quick).title
