"""The host's part of a look: processor, memory and disk, and the processor's energy where it can be read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

POWERCAP = Path("/sys/class/powercap")
SHORTEST_SHARE_S = 0.1
"""Processor time is counted in ticks of 10 ms: a share of less time than this would be noise."""


class HostSensors:
    """This process and the machine around it; ``folder`` is on the disk that is watched."""

    def __init__(self, folder: Path, *, powercap: Path = POWERCAP) -> None:
        self.folder = folder
        self._process = psutil.Process()
        self._rapl = Rapl(powercap)
        self._process_before: tuple[float, float] | None = None
        self._system_before: tuple[float, float] | None = None
        self._questions: tuple[Callable[[], dict[str, Any]], ...] = (
            self._rapl.read,
            self._process_cpu,
            self._system_cpu,
            self._memory,
            self._disk,
            self._io,
        )
        self._fields = (
            ("cpu_energy_counter_j",),
            ("process_cpu_percent",),
            ("system_cpu_percent",),
            ("process_rss_bytes", "ram_used_bytes", "ram_total_bytes"),
            ("disk_used_bytes", "disk_free_bytes"),
            ("process_read_bytes", "process_written_bytes"),
        )

    def read(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Fields of a `HardwareRecord`, and the reason for each that is missing."""
        found: dict[str, Any] = {}
        unknown: dict[str, str] = {}
        for fields, question in zip(self._fields, self._questions, strict=True):
            try:
                found |= question()
            except Exception as error:  # a container may hide any of these
                unknown |= dict.fromkeys(fields, str(error) or type(error).__name__)
        return found, unknown

    def _process_cpu(self) -> dict[str, float]:
        """Of one core, since the look before."""
        now = (time.process_time(), time.monotonic())
        before = self._process_before
        if before is None or now[1] - before[1] >= SHORTEST_SHARE_S:
            self._process_before = now
        return {"process_cpu_percent": 100 * _share(before, now)}

    def _system_cpu(self) -> dict[str, float]:
        """Of all cores, since the look before; time waited for a disk is idle."""
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user
        now = (total_s - idle_s, total_s)
        before = self._system_before
        if before is None or now[1] - before[1] >= SHORTEST_SHARE_S:
            self._system_before = now
        return {"system_cpu_percent": min(100.0, max(0.0, 100 * _share(before, now)))}  # iowait may run backwards

    def _memory(self) -> dict[str, int]:
        memory = psutil.virtual_memory()
        return {
            "process_rss_bytes": self._process.memory_info().rss,
            "ram_used_bytes": memory.total - memory.available,
            "ram_total_bytes": memory.total,
        }

    def _disk(self) -> dict[str, int]:
        disk = shutil.disk_usage(self.folder)
        return {"disk_used_bytes": disk.used, "disk_free_bytes": disk.free}

    def _io(self) -> dict[str, int]:
        counters = self._process.io_counters()
        return {"process_read_bytes": counters.read_bytes, "process_written_bytes": counters.write_bytes}


def _share(before: tuple[float, float] | None, now: tuple[float, float]) -> float:
    """Growth of the first number over growth of the second, which is in seconds."""
    if before is None:
        raise ValueError("a share of time needs an earlier look")
    if now[1] - before[1] < SHORTEST_SHARE_S:
        raise ValueError(f"less than {SHORTEST_SHARE_S:g} s since the look before")
    return (now[0] - before[0]) / (now[1] - before[1])


class Rapl:
    """Joules that the processor packages have used, from Linux' powercap; its counters wrap, this one does not.

    A package counts every process that runs on it. Reading is root's only on most machines
    (CVE-2020-8694): then, and on a processor or in a machine without it, the reason is raised.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = (
            [
                zone
                for zone in sorted(powercap.glob("intel-rapl:*"))
                if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")
            ]
            if os.access(powercap, os.R_OK)
            else []
        )
        self._before_uj: dict[Path, int] = {}
        self._total_uj = 0

    def read(self) -> dict[str, float]:
        """``cpu_energy_counter_j`` since the first read."""
        if not self._packages:
            raise OSError("no RAPL energy counter of the processor is readable on this machine")
        now_uj = {zone: int(_text(zone / "energy_uj", required=True)) for zone in self._packages}
        for zone, value_uj in now_uj.items():
            grown_uj = value_uj - self._before_uj.get(zone, value_uj)
            if grown_uj < 0:  # wrapped: the range is the largest value it reaches
                grown_uj += int(_text(zone / "max_energy_range_uj", required=True)) + 1
            self._total_uj += grown_uj
        self._before_uj = now_uj
        return {"cpu_energy_counter_j": self._total_uj / 1e6}


def _text(path: Path, *, required: bool = False) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        if required:
            raise OSError(f"{path.name} of {path.parent.name}: {error.strerror}") from error
        return ""
