"""``runs/<run_id>/forensics.json``: everything that the replay of a failed step found. Torch-free."""

from __future__ import annotations

import msgspec

from instrument.results.schemas import FirstNonfinite, Record


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
    that is not finite either; ``zero_denominators``: failed elements that were divided by zero."""

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
