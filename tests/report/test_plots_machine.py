"""The figures of the sections on failures and on the machine, from planted samples to the picture."""

import json

import numpy as np
import pytest

from report.bench.simulate import simulate
from report.load import load
from report.plots.registry import DRAW
from report.plots.style import theme
from report.tables import hardware, headroom_map, step_times


@pytest.fixture
def place(tmp_path):
    simulate(tmp_path / "results", seeds=1, steps=60)
    return tmp_path / "results"


def drawn(table):
    with theme(table.name):
        figure = DRAW[table.letter](table)
        figure.draw_without_rendering()
    return figure


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_step_times_leave_warm_up_out_and_agree_with_numpy(place):
    folder = load(place)
    table = step_times.table(folder)
    run = next(run for run in folder.runs if run.dtype_config == "amp_bf16" and run.case == "gpt2_clm")
    times = folder.steps(run.run_id)["step_time_s"][3:]
    row = table.summary.query("case == 'gpt2_clm' and dtype_config == 'amp_bf16'").iloc[0]
    assert row["n"] == 57 and row["mean_s"] == pytest.approx(times.mean())
    assert row["p95_s"] == pytest.approx(np.percentile(times, 95))
    assert len(drawn(table).axes) == 12


def test_nothing_sampled_says_so(place):
    for module, why in ((hardware, "hardware.jsonl"), (headroom_map, "activations.jsonl")):
        table = module.table(load(place))
        assert why in table.empty and "not measured" in words(drawn(table))


def test_hardware_growth_starts_at_zero_and_absent_readings_say_not_measured(place):
    run_id = next(run.run_id for run in load(place).runs if run.dtype_config == "amp_bf16")
    rows = [{"schema": 1, "time_s": i * 0.1, "unix_s": 1e9 + i, "process_rss_bytes": 10**9 + i,
             "system_cpu_percent": 50.0 + i % 7, "disk_used_bytes": 5 * 10**10 + i * 10**6} for i in range(40)]
    (place / "runs" / run_id / "hardware.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = hardware.table(load(place))
    assert table.data["disk_growth_bytes"].iloc[[0, -1]].tolist() == [0, 39 * 10**6]
    assert "resident memory" in table.title
    figure = drawn(table)
    assert words(figure).count("not measured") == 3  # GPU memory twice, GPU utilisation once


def test_headroom_names_the_tightest_module_of_the_diverged_run(place):
    runs = load(place).runs
    for config, top in (("fp16_naive", 60_000.0), ("amp_bf16", 2.0)):
        run_id = next(run.run_id for run in runs if run.dtype_config == config)
        rows = [{"step": step, "module": module, "order": order, "direction": "fwd", "dtype": "fp16", "schema": 1,
                 "absmax": top if module == "lm_head" and step == 5 else 1.0, "nan": 0, "inf": 0, "flush_frac": None}
                for step in range(1, 7) for order, module in enumerate(("wte", "h.0", "lm_head"))]
        (place / "runs" / run_id / "activations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = headroom_map.table(load(place))
    assert table.title.startswith("Least headroom: lm_head of fp16_naive") and "at step 5" in table.title
    assert table.data["headroom_bits"].min() == pytest.approx(np.log2(65_504 / 60_000))
    axes = drawn(table).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wte", "h.0", "lm_head"]
