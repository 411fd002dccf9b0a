"""The sensors of one GPU: NVML's quick questions, asked with `Patience`, since a driver may never answer.

A call into a driver that hangs cannot be interrupted, so questions are asked on a daemon thread, which a process does not
wait for at its exit. The caller waits a moment, takes the answers that are there, and never repeats a question that took
too long: the thread that is stuck in it is abandoned and replaced, once per question at most.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from instrument.nvml import Nvml

Question = Callable[[], Any]


@dataclass
class _Round:
    """Questions under way, filled in by the asking thread."""

    questions: dict[str, Question]
    answers: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    current: tuple[str, float] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Patience:
    """Answers within ``wait_s``; a question that takes longer than ``limit_s`` is never asked again."""

    def __init__(self, *, wait_s: float = 0.25, limit_s: float = 1.0) -> None:
        self.wait_s = wait_s
        self.limit_s = limit_s
        self.given_up: dict[str, str] = {}
        self.cpu_s = 0.0
        self._round: _Round | None = None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, questions: dict[str, Question], *, wait_s: float | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        """Answers by question, and the reason of each one that has none. Never raises, never waits longer."""
        if self._stuck():
            name = self._round.current[0] if self._round.current else "the first question"
            return {}, {question: f"waiting for {name}" for question in questions}
        now = _Round({name: ask for name, ask in questions.items() if name not in self.given_up})
        if now.questions:
            self._round = now
            self._start()
            self._queue.put(now)
            now.done.wait(self.wait_s if wait_s is None else wait_s)
        answers, reasons = dict(now.answers), dict(now.reasons)
        for name in questions:
            if name not in answers and name not in reasons:
                reasons[name] = self.given_up.get(name) or f"no answer within {self.wait_s if wait_s is None else wait_s:g} s"
        return answers, reasons

    def close(self) -> None:
        """Let the thread go when it is idle; one that is stuck is left to the end of the process."""
        self._queue.put(None)

    def _stuck(self) -> bool:
        """Whether the thread still is at an earlier round; gives up on its question after ``limit_s``."""
        if self._round is None or self._round.done.is_set():
            return False
        current = self._round.current
        if current is None or time.monotonic() - current[1] < self.limit_s:
            return True
        self.given_up[current[0]] = f"no answer within {self.limit_s:g} s; not asked again"
        self._queue.put(None)
        self._queue, self._thread, self._round = queue.SimpleQueue(), None, None
        return False

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._queue,), name="ddb-nvml", daemon=True)
            self._thread.start()

    def _work(self, rounds: queue.SimpleQueue) -> None:
        while (now := rounds.get()) is not None:
            for name, question in now.questions.items():
                if rounds is not self._queue:  # replaced while it was stuck: nobody waits for the rest
                    return
                began_s = time.monotonic()
                now.current = (name, began_s)
                try:
                    now.answers[name] = question()
                except Exception as error:
                    now.reasons[name] = str(error) or type(error).__name__
                took_s = time.monotonic() - began_s
                if took_s > self.limit_s:
                    self.given_up[name] = f"took {took_s:.1f} s; not asked again"
            now.done.set()
            self.cpu_s = time.thread_time()


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

        In a container NVML lists the host's process ids, among which this process cannot be found.
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
