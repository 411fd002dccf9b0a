"""Facts from NVML, the driver's own library. Torch-free. Every call may fail or be missing:
what cannot be had is null, with the reason beside it.

NVML's index is not CUDA's (`CUDA_VISIBLE_DEVICES`, MIG), so devices are found by UUID. In a
container NVML returns the host's process ids, which name other processes here, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}
CLOCK_EVENT_REASONS = dict(
    enumerate(
        "gpu_idle applications_clocks_setting sw_power_cap hw_slowdown sync_boost sw_thermal_slowdown hw_thermal_slowdown "
        "hw_power_brake_slowdown display_clock_setting board_limit reliability".split()
    )
)
"""Bit number -> why the clocks are below their maximum (nvml.h, ``nvmlClocksEventReason*``)."""
MOST_NVLINKS = 18
TEMPERATURE_GPU, CLOCK_SM, CLOCK_MEMORY = 0, 1, 2


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
            with suppress(RuntimeError):
                self._need("nvmlShutdown")
            self._library, self.unavailable = None, "NVML is closed"

    def driver(self) -> dict[str, Any]:
        """``version``, the newest CUDA it serves, how many GPUs it sees, and ``unknown`` reasons."""
        return self._facts(
            {
                "version": lambda: _text(self._need("nvmlSystemGetDriverVersion")),
                "cuda": lambda: _cuda_version(self._need("nvmlSystemGetCudaDriverVersion_v2")),
                "gpu_count": lambda: int(self._need("nvmlDeviceGetCount")),
            }
        )

    def device(self, uuid: str) -> dict[str, Any]:
        """Memory in bytes, processes, power limit in watts, PCIe and NVLink, MIG and compute mode of ``GPU-...``."""

        def handle() -> Any:
            return self._need("nvmlDeviceGetHandleByUUID", uuid)

        def memory(field: str) -> int:
            return int(getattr(self._need("nvmlDeviceGetMemoryInfo", handle()), field))

        return self._facts(
            {
                "memory_total_bytes": lambda: memory("total"),
                "memory_free_bytes": lambda: memory("free"),
                "memory_used_bytes": lambda: memory("used"),
                "processes": lambda: self._processes(handle()),
                "power_limit_w": lambda: self._need("nvmlDeviceGetPowerManagementLimit", handle()) / 1e3,
                "mig": lambda: bool(self._need("nvmlDeviceGetMigMode", handle())[0]),
                "pcie_generation": lambda: int(self._need("nvmlDeviceGetMaxPcieLinkGeneration", handle())),
                "pcie_lanes": lambda: int(self._need("nvmlDeviceGetMaxPcieLinkWidth", handle())),
                "nvlinks": lambda: sum(self._nvlink(handle(), link) for link in range(MOST_NVLINKS)),
                "compute_mode": lambda: COMPUTE_MODES.get(self._need("nvmlDeviceGetComputeMode", handle()), "unknown"),
            }
        )

    def _nvlink(self, handle: Any, link: int) -> bool:
        """Whether a link of the GPU is up; one that it does not have is not."""
        try:
            return bool(self._need("nvmlDeviceGetNvLinkState", handle, link))
        except RuntimeError:
            return False

    def sensors(self, uuid: str) -> dict[str, Callable[[], dict[str, Any]]]:
        """Questions quick enough to be asked twice a second, by NVML's name; each answers some fields.

        ``uuid`` with or without ``GPU-``/``MIG-``. Of a MIG instance the memory is its own, and power,
        energy, temperature and clocks are those of the whole board. Raises RuntimeError when there is
        no such device; a question raises one with its reason. None lists processes (milliseconds).
        """
        own, board, mig = self.find(uuid)

        def memory() -> dict[str, int]:
            info = self._need("nvmlDeviceGetMemoryInfo", own)
            return {"gpu_memory_used_bytes": int(info.used), "gpu_memory_total_bytes": int(info.total)}

        def utilization() -> dict[str, int]:
            rates = self._need("nvmlDeviceGetUtilizationRates", own)
            return {"gpu_utilization_percent": int(rates.gpu), "gpu_memory_utilization_percent": int(rates.memory)}

        def clock_hz(kind: int) -> int:
            return int(self._need("nvmlDeviceGetClockInfo", board, kind)) * 1_000_000

        return {  # the counter first: its moment is the sample's
            "nvmlDeviceGetTotalEnergyConsumption": lambda: {
                "gpu_energy_counter_j": self._need("nvmlDeviceGetTotalEnergyConsumption", board) / 1e3
            },
            "nvmlDeviceGetPowerUsage": lambda: {"gpu_power_w": self._need("nvmlDeviceGetPowerUsage", board) / 1e3},
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetUtilizationRates": utilization,
            "nvmlDeviceGetTemperature": lambda: {
                "gpu_temperature_c": int(self._need("nvmlDeviceGetTemperature", board, TEMPERATURE_GPU))
            },
            "nvmlDeviceGetClockInfo": lambda: {
                "gpu_sm_clock_hz": clock_hz(CLOCK_SM),
                "gpu_memory_clock_hz": clock_hz(CLOCK_MEMORY),
            },
            "nvmlDeviceGetCurrentClocksEventReasons": lambda: {
                "gpu_clock_event_reasons": clock_event_reasons(self._clock_events(board))
            },
            "nvmlDeviceIsMigDeviceHandle": lambda: {"gpu_is_mig": mig},
        }

    def find(self, uuid: str) -> tuple[Any, Any, bool]:
        """Handles of a device and of the board it is on, and whether it is a MIG instance; or RuntimeError."""
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        try:
            own, mig = self._need("nvmlDeviceGetHandleByUUID", f"GPU-{bare}"), False
        except RuntimeError as no_gpu:
            try:
                own, mig = self._need("nvmlDeviceGetHandleByUUID", f"MIG-{bare}"), True
            except RuntimeError:
                raise no_gpu from None
        return own, self._need("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", own) if mig else own, mig

    def processes(self, uuid: str) -> list[dict[str, int | None]]:
        """``pid`` and ``used_bytes`` of each process on a device; takes milliseconds. Or RuntimeError."""
        return self._processes(self.find(uuid)[0])

    def _clock_events(self, handle: Any) -> int:
        """Bits of `CLOCK_EVENT_REASONS`; drivers before 535 know the call by its older name."""
        try:
            return int(self._need("nvmlDeviceGetCurrentClocksEventReasons", handle))
        except RuntimeError as error:
            try:
                return int(self._need("nvmlDeviceGetCurrentClocksThrottleReasons", handle))
            except RuntimeError:
                raise error from None

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


def clock_event_reasons(bits: int) -> list[str]:
    """The names of the bits that are set; one that is not known reads ``bit_<n>``."""
    return [CLOCK_EVENT_REASONS.get(bit, f"bit_{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _cuda_version(number: int) -> str:
    """12040 -> ``12.4``."""
    return f"{number // 1000}.{number % 1000 // 10}"
