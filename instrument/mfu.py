"""Model FLOPs utilisation: three denominators, two numerators. Torch-free.

    mfu                each FLOP against the dense peak of the dtype it ran in
    mfu_bf16_peak      against the card's dense bf16 peak: the one to compare configurations with
    mfu_measured_peak  each FLOP against the rate that this machine reached in its dtype
                       (``python -m harness doctor --measure``)

each over all tokens and over real ones (``_real_tokens``: as if no padding had run). A run that
mixes dtypes has a weighted peak: the time it would need if every product ran at its own dtype's
peak gives the harmonic mean, never the arithmetic one. What is not known is None, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from instrument.flops.formula import StepFlops
from instrument.gpus import known_card
from instrument.results.schemas import StepRecord

DENOMINATORS = ("mfu", "mfu_bf16_peak", "mfu_measured_peak")


@dataclass(frozen=True)
class Peaks:
    """FLOP/s by dtype. Where a table is None, its ``unknown`` is the reason. ``gpu``: the driver's name for
    it, None on a CPU."""

    gpu: str | None = None
    datasheet: Mapping[str, float] | None = None
    datasheet_source: str | None = None
    datasheet_unknown: str | None = None
    measured: Mapping[str, float] | None = None
    measured_unknown: str | None = None
    measured_remark: str | None = None

    def of_many(self, processes: int) -> Peaks:
        """The peaks of as many of these together."""
        if processes == 1:
            return self
        tables = {
            name: {dtype: processes * rate for dtype, rate in table.items()}
            for name in ("datasheet", "measured")
            if (table := getattr(self, name)) is not None
        }
        return replace(self, **tables)

    def of(self, denominator: str, flops: Mapping[str, int]) -> float | None:
        """The peak in FLOP/s that ``flops`` (by dtype) are held against."""
        if denominator == "mfu_bf16_peak":
            return (self.datasheet or {}).get("bf16")
        return weighted_peak(flops, self.datasheet if denominator == "mfu" else self.measured)


def datasheet_peaks(gpu: str | None) -> dict[str, Any]:
    """`Peaks`' datasheet fields for a GPU by the driver's name, or for a CPU (None)."""
    if gpu is None:
        return {"datasheet_unknown": "a CPU has no datasheet peak; mfu_measured_peak is against its measured rate"}
    card = known_card(gpu)
    if card is None:
        return {"gpu": gpu, "datasheet_unknown": f"no published peak is known for {gpu!r}, and none is guessed"}
    return {"gpu": gpu, "datasheet": card.peaks(), "datasheet_source": f"{card.name}, dense: {card.source}"}


def weighted_peak(flops: Mapping[str, int], peaks: Mapping[str, float] | None) -> float | None:
    """FLOP/s of this mixture if every dtype ran at its peak; None when a peak that it needs is not known."""
    needed = {dtype: count for dtype, count in flops.items() if count}
    if peaks is None or not needed or not all(dtype in peaks for dtype in needed):
        return None
    if len(needed) == 1:  # exactly the table's number, not one that was divided and multiplied
        return float(peaks[next(iter(needed))])
    return sum(needed.values()) / sum(count / peaks[dtype] for dtype, count in needed.items())


def figures(flops: Mapping[str, int], real: Mapping[str, int], time_s: float | None, peaks: Peaks) -> dict[str, float | None]:
    """The six figures for work by dtype, over all tokens and over real ones, done in ``time_s`` seconds."""
    found: dict[str, float | None] = {}
    for suffix, work in (("", flops), ("_real_tokens", real)):
        for denominator in DENOMINATORS:
            peak = peaks.of(denominator, work)
            known = peak is not None and time_s is not None and time_s > 0
            found[denominator + suffix] = sum(work.values()) / time_s / peak if known else None
    return found


class Utilisation:
    """FLOPs and MFU of one run's records. ``step_flops`` is None when the model cannot be counted, and
    ``not_counted`` says why."""

    def __init__(self, step_flops: StepFlops | None, peaks: Peaks, not_counted: str | None = None) -> None:
        self.step_flops = step_flops
        self.peaks = peaks
        self.not_counted = not_counted
        self._work: dict[int, tuple[dict[str, int], dict[str, int]]] = {}

    def fill(self, record: StepRecord, lengths: Iterable[int]) -> StepRecord:
        """The record with FLOPs and MFU. ``lengths``: the real tokens of every row of the step."""
        if self.step_flops is None:
            return record
        work = self.step_flops.of(record.samples, record.seq_len), self.step_flops.real(lengths)
        self._work[record.step] = work
        return msgspec.structs.replace(record, flops=sum(work[0].values()), **figures(*work, record.step_time_s, self.peaks))

    def summary(self, steps: Sequence[StepRecord], untimed_steps: int) -> dict[str, Any]:
        """`RunRecord`'s fields from the run's filled steps: FLOPs a step are the mean over all of them, MFU
        is total over total of the timed ones."""
        filled = [step for step in steps if step.step in self._work]
        if not filled:
            return {}
        timed = [step for step in filled[untimed_steps:] if step.step_time_s is not None]
        flops, real = ([self._work[step.step][which] for step in timed] for which in (0, 1))
        peak = self.peaks.of("mfu", _total(flops))
        return {
            "flops_per_step": round(sum(step.flops for step in filled) / len(filled)),
            "peak_flops_per_s": peak,
            "peak_flops_source": self.peaks.datasheet_source if peak is not None else None,
            **figures(_total(flops), _total(real), sum(step.step_time_s for step in timed), self.peaks),
        }

    def missing(self) -> dict[str, str]:
        """What is not known, and why: ``not_counted``, ``datasheet_unknown``, ``measured_unknown``."""
        if self.step_flops is None:
            return {"not_counted": self.not_counted or "unknown"}
        reasons = {
            "datasheet_unknown": self.peaks.datasheet_unknown or self._lacking(self.peaks.datasheet, "datasheet"),
            "measured_unknown": self.peaks.measured_unknown or self._lacking(self.peaks.measured, "measurement"),
        }
        return {name: reason for name, reason in reasons.items() if reason}

    def warning(self) -> str | None:
        """One sentence for a person about what will be null though people expect it, or None. That a CPU has no
        datasheet peak surprises nobody."""
        missing = self.missing()
        return missing.get("not_counted") or (missing.get("datasheet_unknown") if self.peaks.gpu else None)

    def flags(self) -> dict[str, Any]:
        """How the figures came about and why some are missing, for the record's ``flags``."""
        if self.step_flops is None:
            return {"flops": self.missing()}
        return {
            "flops": {
                "source": self.step_flops.source,
                "dtypes": self.step_flops.dtypes._asdict(),
                "causal_attention": "full" if self.step_flops.causal else None,
                "measured_remark": self.peaks.measured_remark,
                "measured_flops_per_s": dict(self.peaks.measured or {}) or None,
                **self.missing(),
            }
        }

    def _lacking(self, peaks: Mapping[str, float] | None, table: str) -> str | None:
        lacking = sorted({dtype for dtype in self.step_flops.dtypes if dtype not in (peaks or {})})
        return f"the {table} has no rate for {' and '.join(lacking)} products" if lacking else None


def _total(work: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in work:
        for dtype, count in part.items():
            total[dtype] = total.get(dtype, 0) + count
    return total
