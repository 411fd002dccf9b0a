"""The duration of one step, measured without waiting for the device."""

from __future__ import annotations

import time

import torch


class StepClock:
    """Seconds of one step: CUDA events, read after the sync of the log point, or the host clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._stop.record()
        else:
            self._stop = time.perf_counter()

    def seconds(self) -> float:
        return self._start.elapsed_time(self._stop) / 1e3 if self._cuda else self._stop - self._start
