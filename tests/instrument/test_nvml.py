"""NVML's facts, of a library that answers, lacks calls, or knows only MIG instances."""

import sys
from types import SimpleNamespace

import pytest

from instrument.nvml import CLOCK_EVENT_REASONS, Nvml, clock_event_reasons


class Library:
    """What pynvml offers, of one GPU with UUID ``GPU-a`` that may be cut into MIG instance ``MIG-b``."""

    def __init__(self, missing=()):
        self._missing = missing
        self.asked = []

    def __getattr__(self, name):
        if not name.startswith("nvml") or name in self._missing:
            raise AttributeError(name)

        def call(*arguments):
            self.asked.append((name, *arguments))
            return self.answer(name, *arguments)

        return call

    def answer(self, name, *arguments):
        if name == "nvmlDeviceGetHandleByUUID":
            handles = {"GPU-a": "board", "MIG-b": "instance"}
            if arguments[0] not in handles:
                raise OSError("Not Found")
            return handles[arguments[0]]
        return {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": "board",
            "nvmlDeviceGetTotalEnergyConsumption": 5_000,
            "nvmlDeviceGetPowerUsage": 250_500,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=60, used=40),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=90, memory=30),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetClockInfo": 1_980,
            "nvmlDeviceGetCurrentClocksEventReasons": 0b1000100,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0b100,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7, usedGpuMemory=30)],
            "nvmlDeviceGetGraphicsRunningProcesses": [],
        }[name]


def sensors(monkeypatch, library, uuid="a"):
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return Nvml().sensors(uuid)


@pytest.mark.parametrize("uuid", ["a", "GPU-a"])
def test_sensors_answer_in_base_units(monkeypatch, uuid):
    found = {}
    for question in sensors(monkeypatch, Library(), uuid).values():
        found |= question()
    assert found == {
        "gpu_energy_counter_j": 5.0,
        "gpu_power_w": 250.5,
        "gpu_memory_used_bytes": 40,
        "gpu_memory_total_bytes": 100,
        "gpu_utilization_percent": 90,
        "gpu_memory_utilization_percent": 30,
        "gpu_temperature_c": 61,
        "gpu_sm_clock_hz": 1_980_000_000,
        "gpu_memory_clock_hz": 1_980_000_000,
        "gpu_clock_event_reasons": ["sw_power_cap", "hw_thermal_slowdown"],
        "gpu_is_mig": False,
    }


def test_a_mig_instance_has_its_own_memory_and_its_boards_power(monkeypatch):
    library = Library()
    questions = sensors(monkeypatch, library, "b")
    library.asked.clear()
    assert questions["nvmlDeviceIsMigDeviceHandle"]() == {"gpu_is_mig": True}
    for name, handle in (("nvmlDeviceGetMemoryInfo", "instance"), ("nvmlDeviceGetPowerUsage", "board")):
        questions[name]()
        assert library.asked[-1] == (name, handle)


def test_an_unknown_uuid_is_refused_with_nvmls_reason(monkeypatch):
    with pytest.raises(RuntimeError, match="NVML: Not Found"):
        sensors(monkeypatch, Library(), "c")


@pytest.mark.process
def test_no_sensor_lists_processes(monkeypatch):
    library = Library()
    for question in sensors(monkeypatch, library).values():
        question()
    assert not [name for name, *_ in library.asked if "Process" in name]


def test_older_drivers_know_the_clock_events_by_another_name(monkeypatch):
    library = Library(missing=("nvmlDeviceGetCurrentClocksEventReasons",))
    question = sensors(monkeypatch, library)["nvmlDeviceGetCurrentClocksEventReasons"]
    assert question() == {"gpu_clock_event_reasons": ["sw_power_cap"]}


def test_clock_event_reasons_are_those_of_nvml():
    """Against the constants of nvidia-ml-py, which are nvml.h's; an unknown bit keeps its number."""
    import pynvml

    assert clock_event_reasons(0) == []
    assert clock_event_reasons(1 << 40 | 1) == ["gpu_idle", "bit_40"]
    spelled = {
        name.removeprefix(prefix).lower(): getattr(pynvml, name)
        for name in dir(pynvml)
        for prefix in ("nvmlClocksEventReason", "nvmlClocksThrottleReason")
        if name.startswith(prefix)
    }
    for bit, name in CLOCK_EVENT_REASONS.items():
        assert spelled[name.replace("_", "")] == 1 << bit, name
