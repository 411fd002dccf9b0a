"""Facts from NVML, the driver's own library. Torch-free. Every call may fail or be missing:
what cannot be had is null, with the reason beside it.

NVML's index is not CUDA's (`CUDA_VISIBLE_DEVICES`, MIG), so devices are found by UUID. In a
container NVML returns the host's process ids, which name other processes here, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}


class Nvml:
    """An open NVML, or the reason in ``unavailable`` why there is none. Use as a context."""

    def __init__(self) -> None:
        self.unavailable: str | None = None
        self._library: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._library = pynvml
        except ImportError:
            self.unavailable = "nvidia-ml-py is not installed"
        except Exception as error:  # NVMLError, or whatever a broken driver raises
            self.unavailable = f"NVML: {error}"

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_) -> None:
        if self._library is not None:
            self._ask("nvmlShutdown")
            self._library, self.unavailable = None, "NVML is closed"

    def driver(self) -> dict[str, Any]:
        """``version``, the newest CUDA it serves, how many GPUs it sees, and ``unknown`` reasons."""
        return self._facts({
            "version": lambda: _text(self._need("nvmlSystemGetDriverVersion")),
            "cuda": lambda: _cuda_version(self._need("nvmlSystemGetCudaDriverVersion_v2")),
            "gpu_count": lambda: int(self._need("nvmlDeviceGetCount")),
        })

    def device(self, uuid: str) -> dict[str, Any]:
        """Memory in bytes, processes, power limit in watts, MIG and compute mode of ``GPU-...``."""
        def handle() -> Any:
            return self._need("nvmlDeviceGetHandleByUUID", uuid)

        def memory(field: str) -> int:
            return int(getattr(self._need("nvmlDeviceGetMemoryInfo", handle()), field))

        return self._facts({
            "memory_total_bytes": lambda: memory("total"),
            "memory_free_bytes": lambda: memory("free"),
            "memory_used_bytes": lambda: memory("used"),
            "processes": lambda: self._processes(handle()),
            "power_limit_w": lambda: self._need("nvmlDeviceGetPowerManagementLimit", handle()) / 1e3,
            "mig": lambda: bool(self._need("nvmlDeviceGetMigMode", handle())[0]),
            "compute_mode": lambda: COMPUTE_MODES.get(self._need("nvmlDeviceGetComputeMode", handle()), "unknown"),
        })

    def _processes(self, handle: Any) -> list[dict[str, int | None]]:
        found = {}
        for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for process in self._need(function, handle):
                used = getattr(process, "usedGpuMemory", None)
                found[int(process.pid)] = {"pid": int(process.pid), "used_bytes": None if used is None else int(used)}
        return [found[pid] for pid in sorted(found)]

    def _facts(self, questions: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        unknown: dict[str, str] = {}
        for name, question in questions.items():
            try:
                answers[name] = question()
            except Exception as error:
                answers[name], unknown[name] = None, str(error) or type(error).__name__
        return answers | {"unknown": unknown}

    def _need(self, function: str, *arguments: Any) -> Any:
        """Call NVML; raises RuntimeError with a reason that can be shown."""
        if self._library is None:
            raise RuntimeError(self.unavailable)
        if not hasattr(self._library, function):
            raise RuntimeError(f"this nvidia-ml-py has no {function}")
        try:
            return getattr(self._library, function)(*arguments)
        except Exception as error:
            raise RuntimeError(f"NVML: {error}") from error

    def _ask(self, function: str) -> None:
        try:
            self._need(function)
        except RuntimeError:
            pass


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _cuda_version(number: int) -> str:
    """12040 -> ``12.4``."""
    return f"{number // 1000}.{number % 1000 // 10}"
