"""Joules, throttling and medians are those of the samples, and null with a reason where the samples do not say."""

import pytest

from instrument.results.measurements import HardwareRecord, Mark
from instrument.sampler.summary import NO_GPU, energy_of, energy_per, summarize


def record(time_s, **fields):
    return HardwareRecord(time_s=time_s, unix_s=1e9 + time_s, **fields)


def at_200_w(seconds, step_s=0.5, **fields):
    return [
        record(i * step_s, gpu_energy_counter_j=1e6 + 200 * i * step_s, gpu_power_w=200.0, **fields)
        for i in range(int(seconds / step_s) + 1)
    ]


def test_energy_over_marked_windows_is_the_counters_growth_in_them_alone():
    records = at_200_w(30)
    records[-1] = record(
        30,
        gpu_energy_counter_j=1e6 + 6000,
        gpu_power_w=200.0,
        marks=[
            Mark(name="timed", edge=edge, time_s=time_s)
            for edge, time_s in (("begin", 2.25), ("end", 10.0), ("begin", 14.1), ("end", 24.35))
        ],
    )
    summary = summarize(records, window="timed")
    assert summary["energy_j"] == pytest.approx(200 * (7.75 + 10.25)) and summary["window_s"] == pytest.approx(18)
    assert summary["energy_source"] == "nvml_energy_counter" and summary["energy_resolution_j"] == 1e-3
    assert summary["energy_edge_j"] == pytest.approx(4 * 100)  # half a second at 200 W around each end
    assert energy_per(summary["energy_j"], steps=10, real_tokens=7_200) == {
        "energy_per_step_j": pytest.approx(360),
        "energy_per_1000_real_tokens_j": pytest.approx(500),
    }
    assert (
        energy_per(None, steps=10, real_tokens=5)
        == energy_per(5.0, steps=0, real_tokens=0)
        == {"energy_per_step_j": None, "energy_per_1000_real_tokens_j": None}
    )


def test_without_a_counter_power_is_integrated_and_said_to_be():
    power = [(i * 0.5, 100 + 10 * i * 0.5) for i in range(61)]  # 100 W + 10 W/s
    energy = energy_of([(5.2, 20.7)], power_w=power)
    assert energy.energy_source == "nvml_power_samples" and energy.energy_resolution_j is None
    assert energy.energy_j == pytest.approx(100 * 15.5 + 5 * (20.7**2 - 5.2**2))
    with_hole = [sample for sample in power if not 10 < sample[0] < 14]
    assert energy_of([(5.2, 20.7)], power_w=with_hole).energy_j is None
    assert "without a sample" in energy_of([(5.2, 20.7)], power_w=with_hole).why


@pytest.mark.parametrize(
    "windows, counter, reason",
    [
        ([(0, 9.9)], [(0, 0), (30, 600)], "less than 10 s is not stated"),
        ([(0, 31)], [(0, 0), (30, 600)], "do not reach"),
        ([(-1, 20)], [(0, 0), (30, 600)], "do not reach"),
        ([(0, 30)], [(0, 500), (10, 900), (11, 0), (30, 700)], "ran backwards"),
        ([(0, 30)], [], "no energy counter"),
    ],
)
def test_energy_that_is_unknown_is_null_with_the_reason(windows, counter, reason):
    energy = energy_of(windows, counter_j=counter)
    assert energy.energy_j is None and energy.energy_source is None and reason in energy.why


def test_a_failing_counter_gives_way_to_power():
    energy = energy_of([(0, 12)], counter_j=[(0, 5), (3, 600)], power_w=[(i, 100.0) for i in range(13)])
    assert (energy.energy_j, energy.energy_source) == (pytest.approx(1200), "nvml_power_samples")


@pytest.mark.parametrize(
    "edges, reason", [(("begin",), "no end"), (("begin", "begin"), "two begins"), (("end",), "two ends"), ((), "never marked")]
)
def test_marks_that_make_no_window_are_said_to_be(edges, reason):
    records = at_200_w(20)
    records[-1] = record(20, marks=[Mark(name="timed", edge=edge, time_s=1.0) for edge in edges])
    summary = summarize(records, window="timed")
    assert summary["energy_j"] is None and reason in summary["why"]


def test_a_mig_instance_has_no_energy_of_its_own():
    summary = summarize(at_200_w(20, gpu_is_mig=True))
    assert summary["energy_j"] is None and "MIG" in summary["why"]


@pytest.mark.parametrize(
    "reasons, throttled",
    [(["sw_power_cap"], False), (["hw_thermal_slowdown"], True), (["hw_power_brake_slowdown"], True), ([], False)],
)
def test_a_throttled_run_is_flagged(reasons, throttled):
    records = [*at_200_w(20, gpu_clock_event_reasons=[]), record(20.5, gpu_clock_event_reasons=reasons)]
    summary = summarize(records)
    assert summary["throttled"] is throttled and summary["throttle_reasons"] == (reasons if throttled else [])
    assert summarize(at_200_w(20))["throttled"] is None


def test_the_processors_energy_speaks_for_runs_on_the_processor_only():
    looks = [record(i, cpu_energy_counter_j=65.0 * i, unknown={"gpu_power_w": NO_GPU} if i == 0 else {}) for i in range(4)]
    assert summarize(looks)["energy_j"] == pytest.approx(195) and summarize(looks)["energy_source"] == "rapl_packages"
    on_gpu = [
        record(i, cpu_energy_counter_j=65.0 * i, unknown={"gpu_power_w": "NVML: Not Supported"} if i == 0 else {})
        for i in range(4)
    ]
    assert summarize(on_gpu)["energy_j"] is None
