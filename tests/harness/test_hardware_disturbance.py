"""A second process on the GPU, and heat: noticed, flagged in the row, and said."""

import io
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console

from harness.run import instruments
from harness.run.execute import execute
from harness.run.progress import disturbance
from harness.run.terminal import show_summary
from instrument.sampler.sampler import Sampler

SW_POWER_CAP, SW_THERMAL, HW_THERMAL = 0x4, 0x20, 0x40


class Nvml:
    """A GPU with this process on it, others where asked, and reasons for its clocks."""

    def __init__(self, reasons: int, others: int) -> None:
        here = [SimpleNamespace(pid=pid, usedGpuMemory=1 << 30) for pid in (os.getpid(), *range(1, others + 1))]
        self.answers = {
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetPowerUsage": 200_000,
            "nvmlDeviceGetTemperature": 93,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=60, used=40),
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=90, memory=30),
            "nvmlDeviceGetTotalEnergyConsumption": 200_000,
            "nvmlDeviceIsMigDeviceHandle": 0,
            "nvmlDeviceGetCurrentClocksEventReasons": reasons,
            "nvmlDeviceGetGraphicsRunningProcesses": [],
            "nvmlDeviceGetComputeRunningProcesses": here,
            "nvmlInit": None,
            "nvmlShutdown": None,
        }

    def __getattr__(self, name):
        if name in self.answers:
            return lambda *_: self.answers[name]
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("reasons", "others", "throttled", "contended"),
    [
        (SW_POWER_CAP, 0, False, False),
        (SW_THERMAL | HW_THERMAL, 0, True, False),
        (SW_POWER_CAP, 2, False, True),
        (HW_THERMAL, 1, True, True),
    ],
)
def test_a_row_has_one_flag_for_heat_and_one_for_company(plan, tmp_path, monkeypatch, reasons, others, throttled, contended):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(reasons, others))
    monkeypatch.setattr(instruments, "_gpu_uuid", lambda device: "GPU-a")
    monkeypatch.setattr(instruments, "Sampler", partial(Sampler, period_s=0.02))  # a quick machine's run is over in no time
    row = execute(plan("gpt2_clm", "fp32_true", max_steps=40), tmp_path)
    hardware = row.flags["hardware"]
    assert (hardware["throttled"], hardware["contended"]) == (throttled, contended), hardware["unknown"]
    assert hardware["company"]["end"]["others"] == others
    screen = io.StringIO()
    show_summary(Console(file=screen, width=200), row, tmp_path)
    assert ("slowed itself down" in screen.getvalue()) == throttled
    assert ("another process was on the GPU" in screen.getvalue()) == contended
    assert (disturbance(row) is None) == (not throttled and not contended)


def test_what_is_not_known_is_no_disturbance(plan, tmp_path):
    row = execute(plan("gpt2_clm", "fp32_true", max_steps=1), tmp_path)
    assert row.flags["hardware"]["throttled"] is None and row.flags["hardware"]["contended"] is None
    assert disturbance(row) is None
