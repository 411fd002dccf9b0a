"""One look at the machine: a line of ``runs/<run_id>/hardware.jsonl``. Torch-free."""

from __future__ import annotations

import msgspec

from instrument.results.schemas import Record


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An end of a window: ``edge`` is ``begin`` or ``end``, ``time_s`` on the sampler's clock."""

    name: str
    edge: str
    time_s: float

    def __post_init__(self) -> None:
        if self.edge not in ("begin", "end"):
            raise ValueError(f"a mark's edge is {self.edge!r}; allowed: begin, end")


class HardwareRecord(Record, frozen=True, kw_only=True):
    """One look. What could not be had is null, and the first record of that reason names it in ``unknown``.

    ``time_s`` counts from the sampler's start on the monotonic clock, ``unix_s`` is the wall clock.
    ``gpu_*`` are NVML's, of the run's device by UUID: memory is all processes' and the driver's,
    power is a one-second average on most cards, the energy counter counts from the driver's start.
    Of a MIG instance only the memory is its own. ``cpu_energy_counter_j`` is RAPL's, of whole
    processor packages. 100 % of ``process_cpu_percent`` is one core; of ``system_cpu_percent``, all.
    ``process_read_bytes`` and ``process_written_bytes`` count from the process' start and reached a disk.
    ``marks`` are those set since the record before.
    """

    time_s: float
    unix_s: float
    gpu_energy_counter_j: float | None = None
    gpu_power_w: float | None = None
    gpu_memory_used_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None
    gpu_utilization_percent: int | None = None
    gpu_memory_utilization_percent: int | None = None
    gpu_temperature_c: int | None = None
    gpu_sm_clock_hz: int | None = None
    gpu_memory_clock_hz: int | None = None
    gpu_clock_event_reasons: list[str] | None = None
    gpu_is_mig: bool | None = None
    cpu_energy_counter_j: float | None = None
    process_cpu_percent: float | None = None
    system_cpu_percent: float | None = None
    process_rss_bytes: int | None = None
    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None
    disk_used_bytes: int | None = None
    disk_free_bytes: int | None = None
    process_read_bytes: int | None = None
    process_written_bytes: int | None = None
    marks: list[Mark] = msgspec.field(default_factory=list)
    unknown: dict[str, str] = msgspec.field(default_factory=dict)
    nonfinite: dict[str, str] = msgspec.field(default_factory=dict)
