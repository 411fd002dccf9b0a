"""The thread that looks at the machine twice a second while a run trains.

It must never stop, slow or hold up the run: it is a daemon, it holds no lock that the training
thread takes, every question may fail, and the GPU's are asked with `Patience`. The training
thread's part is `mark`, which notes a time and wakes the sampler.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from instrument.results.files import remove
from instrument.results.hardware import HardwareRecord, Mark
from instrument.results.log import JsonlLog, read
from instrument.results.schemas import RecordError
from instrument.sampler.gpu import FIELDS, GpuSensors, company_unknown
from instrument.sampler.host import HostSensors
from instrument.sampler.summary import NO_GPU, summarize

PERIOD_S = 0.5
SHORTEST_GAP_S = 0.1
"""Marks ask for a look at once; a loop that marks every step must not make the sampler busy."""
NO_GPU_FIELDS = {field: NO_GPU for fields in FIELDS.values() for field in fields}


class Sampler:
    """Writes a `HardwareRecord` to ``path`` every ``period_s`` seconds between `start` and `stop`.

    ``gpu_uuid``: of the run's device (``torch.cuda.get_device_properties(device).uuid``), or None on a
    CPU. A context: leaving it stops.
    """

    def __init__(self, path: Path, *, gpu_uuid: str | None = None, period_s: float = PERIOD_S) -> None:
        self.path = path
        self.period_s = period_s
        self.failure: str | None = None
        self._uuid = gpu_uuid
        self._gpu: GpuSensors | None = None
        self._marks: deque[Mark] = deque()
        self._told: dict[str, str] = {}
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

        A thread that does not end in time is left behind, and the summary is of what it wrote.
        A second call sums up again.
        """
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.failure = self.failure or f"the sampler did not end within {timeout_s:g} s"
        return self._summary(window)

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def _summary(self, window: str | None) -> dict[str, Any]:
        records = []
        try:
            for record in read(self.path, HardwareRecord):
                records.append(record)
        except (OSError, RecordError) as error:  # the last line of a thread left behind may be torn
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
        except Exception as error:  # a full disk, say: the run goes on without the sampler
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
        """Everything once. The reason of a null is told when it is new."""
        time_s, unix_s = time.monotonic() - self._start_s, time.time()
        gpu, gpu_unknown = self._gpu.read() if self._gpu is not None else ({}, NO_GPU_FIELDS)
        host, host_unknown = self._host.read()
        unknown = gpu_unknown | host_unknown
        news = {field: reason for field, reason in unknown.items() if self._told.get(field) != reason}
        self._told |= news
        marks = [self._marks.popleft() for _ in range(len(self._marks))]
        self._samples += 1
        self._cpu_s = time.thread_time() + (self._gpu.patience.cpu_s if self._gpu is not None else 0.0)
        return HardwareRecord(time_s=time_s, unix_s=unix_s, **gpu, **host, marks=marks, unknown=news)

    def _list_company(self, when: str) -> None:
        self._company[when] = company_unknown(NO_GPU) if self._gpu is None else self._gpu.company()
