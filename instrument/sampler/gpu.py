"""The GPU's part of a look: NVML's quick sensors of one device, asked with patience."""

from __future__ import annotations

import os
from typing import Any

from instrument.nvml import Nvml
from instrument.sampler.patience import Patience

FIELDS = {
    "nvmlDeviceGetTotalEnergyConsumption": ("gpu_energy_counter_j",),
    "nvmlDeviceGetPowerUsage": ("gpu_power_w",),
    "nvmlDeviceGetMemoryInfo": ("gpu_memory_used_bytes", "gpu_memory_total_bytes"),
    "nvmlDeviceGetUtilizationRates": ("gpu_utilization_percent", "gpu_memory_utilization_percent"),
    "nvmlDeviceGetTemperature": ("gpu_temperature_c",),
    "nvmlDeviceGetClockInfo": ("gpu_sm_clock_hz", "gpu_memory_clock_hz"),
    "nvmlDeviceGetCurrentClocksEventReasons": ("gpu_clock_event_reasons",),
    "nvmlDeviceIsMigDeviceHandle": ("gpu_is_mig",),
}
"""What each question of `Nvml.sensors` answers."""
OPEN = "opening NVML"
LIST = "listing processes"
LISTING_WAIT_S = 1.0


class GpuSensors:
    """The sensors of the GPU (or MIG instance) with ``uuid``. Nothing here raises or blocks for long."""

    def __init__(self, uuid: str, *, patience: Patience | None = None) -> None:
        self.uuid = uuid
        self.patience = patience or Patience()
        self._nvml: Nvml | None = None
        self._sensors: dict[str, Any] | None = None

    def read(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Fields of a `HardwareRecord`, and the reason for each that is missing."""
        if self._sensors is None:
            _, why = self.patience.ask({OPEN: self._open})
            if self._sensors is None:
                reason = f"{OPEN}: {why[OPEN]}" if OPEN in why else "NVML could not be opened"
                return {}, {field: reason for fields in FIELDS.values() for field in fields}
        answers, why = self.patience.ask(self._sensors)
        found = {field: value for answer in answers.values() for field, value in answer.items()}
        return found, {field: reason for name, reason in why.items() for field in FIELDS[name]}

    def company(self) -> dict[str, Any]:
        """Whether other processes are on the device: ``others`` is how many at least, or null with ``why``.

        In a container NVML lists the host's process ids, among which this process cannot be told.
        """
        answers, why = self.patience.ask({LIST: self._list}, wait_s=LISTING_WAIT_S)
        if LIST not in answers:
            return company_unknown(why[LIST])
        return company_of(answers[LIST], os.getpid())

    def close(self) -> None:
        """Close NVML without waiting for it."""
        if self._nvml is not None:
            self.patience.ask({"closing NVML": lambda: self._nvml.__exit__()}, wait_s=0.1)
        self.patience.close()

    def _open(self) -> None:
        """On the asking thread. A library that failed to start is not started again."""
        self._nvml = self._nvml or Nvml()
        if self._nvml.unavailable:
            raise RuntimeError(self._nvml.unavailable)
        self._sensors = self._nvml.sensors(self.uuid)

    def _list(self) -> list[dict[str, int | None]]:
        if self._sensors is None:
            raise RuntimeError("NVML is not open")
        return self._nvml.processes(self.uuid)


def company_of(processes: list[dict[str, int | None]], own_pid: int) -> dict[str, Any]:
    """What a process listing says about others than ``own_pid``, and no more than that."""
    others = [process for process in processes if process["pid"] != own_pid]
    if len(others) < len(processes):
        known = [process["used_bytes"] for process in others]
        return {"others": len(others), "others_bytes": None if None in known else sum(known), "why": None}
    if len(processes) > 1:  # ids of another namespace: one of them may be this process, the rest are not
        return {"others": len(processes) - 1, "others_bytes": None, "why": "process ids are another namespace's"}
    return company_unknown(
        "one process is listed, under an id of another namespace: it may be this one"
        if processes
        else "no process is listed, not even this one"
    )


def company_unknown(why: str) -> dict[str, Any]:
    """Nothing is known about other processes, and why."""
    return {"others": None, "others_bytes": None, "why": why}
