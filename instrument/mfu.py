"""Model FLOPs utilisation: three denominators, two numerators; and the GPU models whose peaks are known. Torch-free.

    mfu                each FLOP against the dense peak of the dtype it ran in
    mfu_bf16_peak      against the card's dense bf16 peak: the one to compare configurations with
    mfu_measured_peak  each FLOP against the rate that this machine reached in its dtype
                       (``python -m harness doctor --measure``)

each over all tokens and over real ones (``_real_tokens``: as if no padding had run). A run that mixes dtypes has a weighted
peak: the time it would need if every product ran at its own dtype's peak gives the harmonic mean, never the arithmetic one.
What is not known is None, with a reason.

Peaks are NVIDIA's own for dense products with fp32 accumulation, in FLOP/s per dtype and per GPU. Most datasheets print the
sparse figure, twice as high; GeForce papers print fp16 accumulation first: neither stands here. None where the card has no such
unit, or where NVIDIA states no single figure. A model that is not listed has no peak, no estimate of time and no MFU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from instrument.flops import StepFlops
from instrument.results.schemas import StepRecord

TERA = 1e12
PRODUCT_DTYPES = ("fp32", "tf32", "fp16", "bf16")
"""Kinds of products that a configuration can run; TF32 is a kind of its own, since it has its own rate."""


@dataclass(frozen=True)
class Card:
    """One model. ``pattern`` must match the whole name that the driver reports; ``tflops_per_s``: peaks by `PRODUCT_DTYPES`;
    ``source``: the document of NVIDIA's that they are from."""

    name: str
    pattern: str
    tflops_per_s: tuple[float | None, ...]
    source: str
    reference: bool = False

    def peaks(self) -> dict[str, float]:
        """FLOP/s by kind of product, without those that the card has not."""
        peaks = zip(PRODUCT_DTYPES, self.tflops_per_s, strict=True)
        return {dtype: value * TERA for dtype, value in peaks if value is not None}


AMPERE, ADA, HOPPER = "GA102 whitepaper", "Ada GPU architecture whitepaper", "H100 datasheet, sparse figures halved"
CARDS: tuple[Card, ...] = (
    Card("RTX A6000", r"(NVIDIA )?RTX A6000", (38.7, 77.4, 154.8, 154.8), AMPERE, reference=True),
    Card("A40", r"(NVIDIA )?A40", (37.4, 74.8, 149.7, 149.7), "A40 datasheet", reference=True),
    Card("V100 SXM2", r"(NVIDIA |Tesla )?V100-SXM[23]-(16|32)GB", (15.7, None, 125, None), "V100 datasheet"),
    Card("V100 PCIe", r"(NVIDIA |Tesla )?V100-PCIE-(16|32)GB", (14, None, 112, None), "V100 datasheet"),
    Card("T4", r"(NVIDIA |Tesla )?T4", (8.1, None, 65, None), "T4 datasheet"),
    Card("A100", r"(NVIDIA )?A100(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe| PCIe 80GB)", (19.5, 156, 312, 312), "A100 datasheet"),
    Card("RTX 3090", r"(NVIDIA )?GeForce RTX 3090", (35.6, 35.6, 71, 71), AMPERE),
    Card("RTX 4090", r"(NVIDIA )?GeForce RTX 4090", (82.6, 82.6, 165.2, 165.2), ADA),
    Card("L4", r"(NVIDIA )?L4", (30.3, 60, 121, 121), "L4 datasheet, sparse figures halved"),
    Card("L40S", r"(NVIDIA )?L40S", (91.6, 183, 362, 362), "L40S datasheet"),
    Card("H100 SXM", r"(NVIDIA )?H100( SXM5)?( 80GB HBM[23]e?)", (67, 494.5, 989, 989), HOPPER),
    Card("H100 PCIe", r"(NVIDIA )?H100 PCIe", (51, 378, 756, 756), HOPPER),
    Card("H100 NVL", r"(NVIDIA )?H100 NVL", (60, 417.5, 835.5, 835.5), HOPPER),
    Card("H200 SXM", r"(NVIDIA )?H200", (67, 494.5, 989, 989), "H200 datasheet, sparse figures halved"),
    # Its fp32 and TF32 peaks are published as 75 to 80 and 1,100 to 1,125, by system: no single figure, so none.
    Card("B200", r"(NVIDIA )?B200", (None, None, 2250, 2250), "HGX B200 datasheet, sparse figures halved"),
)


def known_card(name: str) -> Card | None:
    """The card with this driver name; None for any other, a MIG slice or a laptop variant included."""
    return next((card for card in CARDS if re.fullmatch(card.pattern, name.strip())), None)


def capability_support(major: int, minor: int) -> dict[str, bool]:
    """What a compute capability does in hardware: tensor-core dtypes, as NVIDIA's CUDA
    programming guide lists them (fp16 from 7.0, bf16 and TF32 from 8.0, fp8 from 8.9)."""
    since = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
    return {dtype: (major, minor) >= first for dtype, first in since.items()}


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

    def fill(self, record: StepRecord, lengths: Sequence[int]) -> StepRecord:
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
