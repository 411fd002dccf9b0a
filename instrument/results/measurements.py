"""Records of what was measured in a run beside its steps: the machine (``hardware.jsonl``), the range of every watched module
(``activations.jsonl``, a line a module, direction and window), and what the replay of a failed step found
(``forensics.json``). Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from instrument.results.schemas import FirstNonfinite, Record


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An end of a window: ``edge`` is ``begin`` or ``end``, ``time_s`` on the sampler's clock."""

    name: str
    edge: str
    time_s: float

    def __post_init__(self) -> None:
        if self.edge not in ("begin", "end"):
            raise ValueError(f"a mark's edge is {self.edge!r}; allowed: begin, end")


class HardwareRecord(Record, frozen=True, kw_only=True):
    """One look at the machine. What could not be had is null, and the first record of that reason names it in ``unknown``.

    ``time_s`` counts from the sampler's start on the monotonic clock, ``unix_s`` is the wall clock. ``gpu_*`` are NVML's, of
    the run's device by UUID: memory is all processes' and the driver's, power is a one-second average on most cards, the energy
    counter counts from the driver's start. Of a MIG instance only the memory is its own. ``cpu_energy_counter_j`` is RAPL's, of
    whole processor packages. 100 % of ``process_cpu_percent`` is one core; of ``system_cpu_percent``, all.
    ``process_read_bytes`` and ``process_written_bytes`` count from the process' start and reached a disk. ``marks`` are those
    set since the record before.
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


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One op with a non-finite output: of the chain (the first of its module and phase that the value
    reached) or an absorbed one. ``tensor`` is the parameter it belongs to, where there is one."""

    phase: str
    module: str | None
    op: str
    tensor: str | None
    kind: str
    dtype: str
    shape: list[int]


class OperandRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor that the culprit read. ``absmax``: largest finite |x|."""

    argument: str
    shape: list[int]
    dtype: str
    absmax: float | None
    nonfinite: int
    zeros: int


class OutputRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the culprit wrote. ``exact_absmax``: the largest |x| that float64 gives where it failed, null where
    that is not finite either; ``zero_denominators``: failed elements that float64 makes finite once no input is exactly zero
    (a divisor, what ``rsqrt`` or a logarithm took)."""

    shape: list[int]
    dtype: str
    nonfinite: int
    numel: int
    exact_absmax: float | None
    zero_denominators: int


class Magnitude(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Largest finite |x| of a module's output and of its gradient in one step; null: not measured."""

    step: int
    module: str
    absmax_fwd: float | None
    absmax_bwd: float | None


class KernelRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kernel (on a CPU: one op) around the failure, in order. ``here`` marks the culprit. ``duration_s`` is
    from the profiled replay; null where the profiler saw no such op."""

    name: str
    phase: str
    module: str | None
    duration_s: float | None
    shapes: list[list[int]]
    dtype: str
    nonfinite: bool
    here: bool


class HistogramRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values of a tensor by power of two: ``counts[i]`` have 2^(lowest + i) <= |x| < 2^(lowest + i + 1)."""

    tensor: str
    lowest: int
    counts: list[int]
    zeros: int
    below: int
    above: int
    nonfinite: int


class Remedy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One change, tried from the snapshot for ``steps`` steps. ``survives`` null: it could not be tried, and
    ``why`` says so. Ratios are to the unchanged run."""

    change: str
    survives: bool | None
    steps: int
    failed_at: int | None
    step_time_ratio: float | None
    bytes_ratio: float | None
    confirms: str | None
    why: str | None = None


class ForensicsRecord(Record, frozen=True, kw_only=True):
    """One failure. ``sentence`` says it; ``matched``: the same failure came again in the replay;
    ``chain`` is in order of execution, the culprit first; ``history`` is of the culprit's module, and
    ``headroom_since_step`` the step since which its values have stayed within a bit of the dtype's limit."""

    run_id: str
    sentence: str
    matched: bool
    first_nonfinite: FirstNonfinite
    parameter: str | None = None
    spread_modules: int = 0
    chain: tuple[Link, ...] = ()
    absorbed: tuple[Link, ...] = ()
    operands: tuple[OperandRecord, ...] = ()
    output: OutputRecord | None = None
    history: tuple[Magnitude, ...] = ()
    headroom_since_step: int | None = None
    histograms: tuple[HistogramRecord, ...] = ()
    kernels: tuple[KernelRow, ...] = ()
    trace_file: str | None = None
    snapshot_file: str | None = None
    snapshot_step: int | None = None
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class TapReading:
    """One module output (``fwd``) or its gradient (``bwd``, at the scale at which backward ran) in one step.

    ``absmax`` is over finite values. ``flush_frac``: share of the nonzero values that fp16 would round to zero; null where only
    the range was taken. ``order`` is the module's place in the model, ``called`` its place in that step's order of execution
    (of several calls the last): modules are not defined in the order they run.
    """

    step: int
    module: str
    order: int
    direction: str
    dtype: str
    absmax: float
    nan: int
    inf: int
    flush_frac: float | None
    called: int


class ModuleRecord(Record, frozen=True, kw_only=True):
    """A module's output (``fwd``) or its gradient (``bwd``, at the scale at which backward ran) over the steps ``first_step``
    to ``step`` in which it was measured. ``absmax``: the largest finite |x|, at step ``absmax_step``; ``flush_frac``: the
    largest share of nonzero values that fp16 would flush to zero, null where only the range was taken."""

    step: int
    first_step: int
    module: str
    order: int
    direction: str
    dtype: str
    absmax: float
    absmax_step: int
    nan: int
    inf: int
    flush_frac: float | None


def module_records(readings: Iterable[TapReading]) -> Iterator[ModuleRecord]:
    """A record for every module and direction in a batch of readings, in the model's order."""
    groups: dict[tuple[int, str], list[TapReading]] = {}
    for reading in readings:
        groups.setdefault((reading.order, reading.direction), []).append(reading)
    for key in sorted(groups, key=lambda k: (k[0], k[1] == "bwd")):
        group = groups[key]
        top = max(group, key=lambda r: r.absmax)
        of_module = {name: getattr(top, name) for name in ("module", "order", "direction", "dtype", "absmax")}
        yield ModuleRecord(**of_module, step=group[-1].step, first_step=group[0].step, absmax_step=top.step, **totals(group))


def totals(readings: Sequence[TapReading]) -> dict[str, Any]:
    """``nan`` and ``inf`` summed, and the largest ``flush_frac`` of those that have one."""
    shares = [r.flush_frac for r in readings if r.flush_frac is not None]
    return {
        "nan": sum(r.nan for r in readings),
        "inf": sum(r.inf for r in readings),
        "flush_frac": max(shares, default=None),
    }
