"""The figures of the sections on failures and on the machine, from planted samples to the picture."""

import json

import numpy as np
import pytest

from benchmarks.simulated_results import simulate
from instrument.results.contents import load
from instrument.results.schemas import FirstNonfinite
from report.plots.draw import draw
from report.plots.style import theme
from report.tables import headroom
from report.tables.machine import hardware, kernel_time, step_times


@pytest.fixture
def place(tmp_path):
    simulate(tmp_path / "results", seeds=1, steps=60)
    return tmp_path / "results"


def drawn(table):
    with theme(table.name):
        figure = draw(table)
        figure.draw_without_rendering()
    return figure


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_step_times_leave_warm_up_out_and_agree_with_numpy(place):
    folder = load(place)
    table = step_times(folder)
    run = next(run for run in folder.runs if run.dtype_config == "amp_bf16" and run.case == "gpt2_clm")
    times = folder.steps(run.run_id)["step_time_s"][3:]
    row = table.summary.query("case == 'gpt2_clm' and dtype_config == 'amp_bf16'").iloc[0]
    assert row["n"] == 57 and row["mean_s"] == pytest.approx(times.mean())
    assert row["p95_s"] == pytest.approx(np.percentile(times, 95))
    assert len(drawn(table).axes) == 12


def test_nothing_sampled_says_so(place):
    for made, why in ((hardware, "hardware.jsonl"), (headroom.table, "activations.jsonl")):
        table = made(load(place))
        assert why in table.empty and "not measured" in words(drawn(table))


def test_hardware_growth_starts_at_zero_and_absent_readings_say_not_measured(place):
    run_id = next(run.run_id for run in load(place).runs if run.dtype_config == "amp_bf16")
    rows = [
        {
            "schema": 1,
            "time_s": i * 0.1,
            "unix_s": 1e9 + i,
            "process_rss_bytes": 10**9 + i,
            "system_cpu_percent": 50.0 + i % 7,
            "disk_used_bytes": 5 * 10**10 + i * 10**6,
        }
        for i in range(40)
    ]
    (place / "runs" / run_id / "hardware.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = hardware(load(place))
    assert table.data["disk_growth_bytes"].iloc[[0, -1]].tolist() == [0, 39 * 10**6]
    assert "resident memory" in table.title
    figure = drawn(table)
    assert "Not measured: GPU memory, GPU utilisation." in words(figure)
    assert len([axes for axes in figure.axes if axes.axison]) == 4  # memory twice, utilisation, disk: no empty frame


def test_headroom_names_the_tightest_module_of_the_diverged_run(place):
    runs = load(place).runs
    for config, top in (("fp16_naive", 60_000.0), ("amp_bf16", 2.0)):
        run_id = next(run.run_id for run in runs if run.dtype_config == config)
        rows = [
            {
                "step": step,
                "module": module,
                "order": order,
                "direction": "fwd",
                "dtype": "fp16",
                "schema": 1,
                "absmax": top if module == "lm_head" and step == 5 else 1.0,
                "nan": 0,
                "inf": 0,
                "flush_frac": None,
            }
            for step in range(1, 7)
            for order, module in enumerate(("wte", "h.0", "lm_head"))
        ]
        (place / "runs" / run_id / "activations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = headroom.table(load(place))
    assert table.title.startswith("Least headroom: lm_head of fp16_naive") and "at step 5" in table.title
    assert table.data["headroom_bits"].min() == pytest.approx(np.log2(65_504 / 60_000))
    axes = drawn(table).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wte", "h.0", "lm_head"]


FORWARD = FirstNonfinite(
    step=4,
    microbatch=0,
    phase="forward",
    phase_surfaced="forward",
    module="lm_head",
    op="addmm",
    tensor="output",
    source_tensor=None,
    kind="inf",
    dtype="float16",
    cause="overflow",
    input_absmax=1.0,
    headroom_bits=0.0,
)


def activations(folder, run_id, tops, module="lm_head"):
    """One module read at steps 1, 2, ..., with these largest values."""
    rows = [
        {
            "step": at,
            "module": module,
            "order": 0,
            "direction": "fwd",
            "dtype": "float16",
            "schema": 1,
            "absmax": top,
            "nan": 0,
            "inf": 0,
            "flush_frac": None,
        }
        for at, top in enumerate(tops, start=1)
    ]
    (folder.path / "runs" / run_id / "activations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_headroom_map_prefers_what_overflowed_and_leaves_one_column_out(plant):
    configs = ("fp16_naive", "amp_fp16", "amp_fp16_unscaled", "amp_bf16")
    folder = plant(
        ("gpt2_clm",),
        configs,
        (0,),
        lambda case, config, seed: {
            "fp16_naive": {"diverges_at": 1},
            "amp_fp16_unscaled": {"diverges_at": 4, "first": FORWARD},
        }.get(config, {}),
    )
    ids = {config: f"gpt2_clm-{config}-s0-0badcafe" for config in configs}
    activations(folder, ids["fp16_naive"], [60_000.0])  # dead at step 1: one column says nothing
    activations(folder, ids["amp_fp16"], [1.0, 2.0, 4.0])
    activations(folder, ids["amp_bf16"], [1.0] * 5)
    activations(folder, ids["amp_fp16_unscaled"], [1.0, 64.0])
    history = [
        {"step": step, "module": "lm_head", "absmax_fwd": top, "absmax_bwd": None}
        for step, top in ((2, 64.0), (3, 32_752.0), (4, None))
    ]
    (folder.path / "runs" / ids["amp_fp16_unscaled"] / "forensics.json").write_text(json.dumps({"history": history}))
    table = headroom.table(load(folder.path))
    assert list(table.data["run_id"].unique()) == [ids["amp_fp16_unscaled"], ids["amp_fp16"]]
    assert table.title == (
        "Least headroom: lm_head of amp_fp16_unscaled on gpt2_clm, 1.0 bits at step 3, down from 16.0 at "
        "step 1; the run overflows at step 4."
    )


def test_a_range_that_is_wide_enough_is_shown_when_there_is_nothing_else(plant):
    folder = plant(
        ("gpt2_clm",),
        ("fp16_naive", "amp_bf16"),
        (0,),
        lambda case, config, seed: {"diverges_at": 1} if config == "fp16_naive" else {},
    )
    activations(folder, "gpt2_clm-fp16_naive-s0-0badcafe", [60_000.0])
    assert "at 3 steps or more" in headroom.table(load(folder.path)).empty
    activations(folder, "gpt2_clm-amp_bf16-s0-0badcafe", [1.0] * 3)
    assert list(headroom.table(load(folder.path)).data["dtype_config"].unique()) == ["amp_bf16"]


def test_a_step_s_time_is_stacked_by_class_and_idle_is_hollow(plant):
    profile = {
        "source": "cpu_self_time",
        "idle_s": 0.2,
        "seconds": {"matmul": {"forward": 1.0, "backward": 2.0}, "<b>": {"x": 0.5}, "copy": "text"},
        "top": [3],
    }
    folder = plant(
        ("gpt2_clm",),
        ("fp32_true", "amp_bf16"),
        (0,),
        lambda *_: {"flags": {"simulated": True, "time_by_kernel": profile, "trace": {"steps": 2}}},
    )
    table = kernel_time(folder)
    figure = drawn(table)
    widths = [round(patch.get_width(), 6) for patch in figure.axes[0].patches]
    assert widths == [1500.0, 250.0, 100.0] * 2
    assert "Not measured" not in words(figure) and words(figure).count("1,850 ms") == 2
    assert table.data["seconds_per_step"].sum() == pytest.approx(2 * 3.7 / 2)
