"""How long a callable takes: with events on a GPU, with the host's clock on a CPU."""

import time
from collections.abc import Callable


class CudaTimer:
    """Times callables with events, each after an L2 flush, with the host running ahead of the device."""

    BUSY_CYCLES = 1_000_000  # about half a millisecond: longer than the host needs to queue a sample

    def __init__(self):
        import torch

        self.torch = torch
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(max(4 * l2, 2**26), dtype=torch.int8, device="cuda")

    def samples(self, calls: list[Callable]) -> list[float]:
        events = []
        for call in calls:
            self.flush.fill_(1)
            self.torch.cuda._sleep(self.BUSY_CYCLES)
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def release(self):
        self.torch.cuda.empty_cache()


class CpuTimer:
    """Times callables with the host's clock."""

    def samples(self, calls: list[Callable]) -> list[float]:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def release(self):
        pass
