"""The thread that reads the machine's sensors twice a second while a run trains; the host's sensors (processor, memory, disk,
the processor's energy where it can be read) are here, the GPU's in `instrument.sampler.gpu`.

It must never stop, slow or hold up the run: it is a daemon, it holds no lock that the training thread takes, every question may
fail, and the GPU's are asked with `Patience`. The training thread only calls `mark`, which notes a time and wakes the sampler.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from instrument.results.files import remove
from instrument.results.lines import read
from instrument.results.log import JsonlLog
from instrument.results.measurements import HardwareRecord, Mark
from instrument.results.schemas import RecordError
from instrument.sampler.gpu import FIELDS, GpuSensors, company_unknown
from instrument.sampler.summary import NO_GPU, summarize

POWERCAP = Path("/sys/class/powercap")
SHORTEST_SHARE_S = 0.1
"""Processor time is counted in ticks of 10 ms: a share of less time than this would be noise."""


class HostSensors:
    """This process and the machine around it; ``folder`` is on the disk that is watched."""

    def __init__(self, folder: Path, *, powercap: Path = POWERCAP) -> None:
        self.folder = folder
        self._process = psutil.Process()
        self._before: dict[str, tuple[float, float]] = {}
        self._questions: dict[tuple[str, ...], Callable[[], dict[str, Any]]] = {
            ("cpu_energy_counter_j",): Rapl(powercap).read,
            ("process_cpu_percent",): self._process_cpu,
            ("system_cpu_percent",): self._system_cpu,
            ("process_rss_bytes", "ram_used_bytes", "ram_total_bytes"): self._memory,
            ("disk_used_bytes", "disk_free_bytes"): self._disk,
            ("process_read_bytes", "process_written_bytes"): self._io,
        }

    def read(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Fields of a `HardwareRecord`, and the reason for each that is missing."""
        found: dict[str, Any] = {}
        unknown: dict[str, str] = {}
        for fields, question in self._questions.items():
            try:
                found |= question()
            except Exception as error:  # a container may hide any of these
                unknown |= dict.fromkeys(fields, str(error) or type(error).__name__)
        return found, unknown

    def _process_cpu(self) -> dict[str, float]:
        """Of one core, since the look before."""
        return {"process_cpu_percent": self._percent("process", time.process_time(), time.monotonic())}

    def _system_cpu(self) -> dict[str, float]:
        """Of all cores, since the look before; time waited for a disk is idle."""
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user
        percent = self._percent("system", total_s - idle_s, total_s)
        return {"system_cpu_percent": min(100.0, max(0.0, percent))}  # iowait may run backwards

    def _percent(self, of: str, busy_s: float, total_s: float) -> float:
        """Growth of the first number over growth of the second, since the look before."""
        before_busy_s, before_s = self._before.setdefault(of, (busy_s, total_s))
        if before_s == total_s and before_busy_s == busy_s:
            raise ValueError("a share of time needs an earlier look")
        if total_s - before_s < SHORTEST_SHARE_S:
            raise ValueError(f"less than {SHORTEST_SHARE_S:g} s since the look before")
        self._before[of] = busy_s, total_s
        return 100 * (busy_s - before_busy_s) / (total_s - before_s)

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


class Rapl:
    """Joules that the processor packages have used, from Linux' powercap; its counters wrap, this one does not.

    A package counts every process that runs on it. Reading is root's only on most machines
    (CVE-2020-8694): then, and on a processor or in a machine without it, the reason is raised.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        zones = sorted(powercap.glob("intel-rapl:*")) if os.access(powercap, os.R_OK) else []
        self._packages = [z for z in zones if z.name.count(":") == 1 and _text(z / "name").startswith("package")]
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


PERIOD_S = 0.5
SHORTEST_GAP_S = 0.1
"""Marks ask for a look at once; a loop that marks every step must not make the sampler busy."""
NO_GPU_FIELDS = {field: NO_GPU for fields in FIELDS.values() for field in fields}


class Sampler:
    """Writes a `HardwareRecord` to ``path`` every ``period_s`` seconds between `start` and `stop`.

    ``gpu_uuid``: of the run's device (``torch.cuda.get_device_properties(device).uuid``), or None on a
    CPU.
    """

    def __init__(self, path: Path, *, gpu_uuid: str | None = None, period_s: float = PERIOD_S) -> None:
        self.path = path
        self.period_s = period_s
        self.failure: str | None = None
        self._uuid = gpu_uuid
        self._gpu: GpuSensors | None = None
        self._marks: deque[Mark] = deque()
        self._reasons_written: dict[str, str] = {}
        self._company: dict[str, Any] = {}
        self._samples = 0
        self._cpu_s = 0.0
        self._start_s = time.monotonic()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ddb-sampler", daemon=True)

    def start(self) -> Sampler:
        """Begin to look; time 0 of the records. A sampler that cannot start says so in its summary."""
        self._start_s = time.monotonic()
        try:
            remove(self.path)  # an earlier run's looks must not be summed up as this one's
            self._thread.start()
        except (OSError, RuntimeError) as error:
            self.failure = f"{type(error).__name__}: {error}"
        return self

    def mark(self, name: str, edge: str) -> None:
        """Begin or end a window now; costs the caller about 0.1 ms. ``edge``: ``begin`` or ``end``."""
        self._marks.append(Mark(name=name, edge=edge, time_s=time.monotonic() - self._start_s))
        self._wake.set()

    def stop(self, timeout_s: float = 2.0, *, window: str | None = None) -> dict[str, Any]:
        """Stop looking and sum up (`summary.summarize`); waits at most ``timeout_s`` for the thread.

        A thread that does not end in time is abandoned, and the summary is of what it wrote. A second call sums up again.
        """
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.failure = self.failure or f"the sampler did not end within {timeout_s:g} s"
        return self._summary(window)

    def _summary(self, window: str | None) -> dict[str, Any]:
        records = []
        try:
            for record in read(self.path, HardwareRecord):
                records.append(record)
        except (OSError, RecordError) as error:  # the last line of an abandoned thread may be torn
            self.failure = self.failure or str(error)
        known = [look["others"] for look in self._company.values() if look["others"] is not None]
        return summarize(records, window=window) | {
            "period_s": self.period_s,
            "contended": any(known) if known else None,
            "company": dict(self._company),
            "sampler_cpu_s_per_sample": self._cpu_s / self._samples if self._samples else None,
            "sampler_failure": self.failure,
        }

    def _run(self) -> None:
        try:
            with JsonlLog(self.path, fresh=True) as log:
                self._look_until_stopped(log)
        except Exception as error:  # a full disk, say: the run continues without the sampler
            self.failure = f"{type(error).__name__}: {error}"

    def _look_until_stopped(self, log: JsonlLog) -> None:
        self._host = HostSensors(self.path.parent)
        self._gpu = GpuSensors(self._uuid) if self._uuid is not None else None
        log.write(self._look())
        self._list_company("start")
        due_s = looked_s = time.monotonic()
        while not self._stop.is_set():
            now_s = time.monotonic()
            due_s = max(due_s + self.period_s, now_s)  # a late look is not made up for
            if self._wake.wait(due_s - now_s):
                due_s -= self.period_s  # a mark's look comes on top of the regular ones
                self._stop.wait(looked_s + min(SHORTEST_GAP_S, self.period_s) - time.monotonic())
            self._wake.clear()
            looked_s = time.monotonic()
            log.write(self._look())
        log.write(self._look())  # after the last mark, however late that came
        self._list_company("end")
        if self._gpu is not None:
            self._gpu.close()

    def _look(self) -> HardwareRecord:
        """Everything once. The reason of a null is written when it is new."""
        time_s, unix_s = time.monotonic() - self._start_s, time.time()
        gpu, gpu_unknown = self._gpu.read() if self._gpu is not None else ({}, NO_GPU_FIELDS)
        host, host_unknown = self._host.read()
        unknown = gpu_unknown | host_unknown
        news = {field: reason for field, reason in unknown.items() if self._reasons_written.get(field) != reason}
        self._reasons_written |= news
        marks = [self._marks.popleft() for _ in range(len(self._marks))]
        self._samples += 1
        self._cpu_s = time.thread_time() + (self._gpu.patience.cpu_s if self._gpu is not None else 0.0)
        return HardwareRecord(time_s=time_s, unix_s=unix_s, **gpu, **host, marks=marks, unknown=news)

    def _list_company(self, when: str) -> None:
        self._company[when] = company_unknown(NO_GPU) if self._gpu is None else self._gpu.company()
