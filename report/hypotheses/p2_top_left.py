"""P2 (plot B): bf16_pure is top-left: the highest MFU and the least memory of every case."""

from __future__ import annotations

import math

from report.hypotheses.evidence_base import BySeed, EvidenceBase, difference, ids, log_ratios
from report.hypotheses.finding import NOT_DECIDED, REFUTED, SUPPORTED, Evidence, Finding, everywhere, finding
from report.statistics.interval import FEWEST_SEEDS, Interval, exponential
from report.tables.b_efficiency import shares_process
from report.tables.columns import REFERENCE, is_control, series_order
from report.words import bounds, gigabytes

CLAIM = "bf16_pure is top-left: in every case no other configuration is faster or needs less memory."
CONFIG = "bf16_pure"
SMALLEST = math.log(1.02)
"""A rival within 2 % of its speed is no faster."""
MEMORY_TOLERANCE = 1.01


def judge(base: EvidenceBase) -> Finding:
    """Every case with a healthy reference. Within a case the FLOPs are equal, so the ratio of MFU against
    one peak is that of samples/s. Memory is the allocator's peak: resident memory is no VRAM."""
    evidence, notes = [], []
    for case in base.cases:
        if case in base.judgements.unhealthy:
            notes.append(f"{case} is not judged: its reference is unhealthy.")
        elif (found := _place(base, case)) is not None:
            evidence.append(found)
    return finding(
        "P2",
        CLAIM,
        "B",
        "speed over its best rival",
        evidence,
        everywhere(evidence),
        more=notes,
        missing="a GPU (peak memory of the allocator), a healthy fp32_true, seeds 0 1 2",
    )


def _place(base: EvidenceBase, case: str) -> Evidence | None:
    ours, reference = base.timed(case, CONFIG), base.timed(case, REFERENCE)
    rivals = {
        config: cell
        for config in series_order({run.dtype_config for run in base.selection.of_case(case)})
        if config != CONFIG and not is_control(config) and (cell := base.timed(case, config))
    }
    if not ours or not rivals:
        return None
    gains = {config: log_ratios(cell, reference, lambda run: run.samples_per_s) for config, cell in rivals.items()}
    own = log_ratios(ours, reference, lambda run: run.samples_per_s)
    leads = {config: difference(own, gain) for config, gain in gains.items()}
    leads = {config: lead for config, lead in leads.items() if lead.n}
    if not leads:
        return None
    rival = min(leads, key=lambda config: leads[config].value)
    lead = leads[rival]
    speed = _worst([_no_slower(each) for each in leads.values()])
    memory, memory_words = _memory(ours, rivals)
    verdict = _worst([speed, memory])
    shown = exponential(lead)
    sentence = f"{CONFIG} runs {shown.value:.2f}x {bounds(shown, '.2f')} as fast as {rival}, its best rival; {memory_words}."
    return Evidence(case, verdict, shown, sentence, ids(ours, *rivals.values()))


def _no_slower(lead: Interval) -> str:
    """The verdict on "no rival is faster" for one rival: a lead that excludes a deficit of 2 %."""
    if lead.n < FEWEST_SEEDS or not lead.known:
        return NOT_DECIDED
    if lead.above(-SMALLEST):
        return SUPPORTED
    return REFUTED if lead.below(0.0) else NOT_DECIDED


def _worst(verdicts: list[str]) -> str:
    return next((v for v in (REFUTED, NOT_DECIDED) if v in verdicts), SUPPORTED)


def _memory(ours: BySeed, rivals: dict[str, BySeed]) -> tuple[str, str]:
    """Whether no rival needs less memory. Peaks repeat from seed to seed, so the seeds' largest is compared."""
    cells = {CONFIG: ours, **rivals}
    peaks = {config: [run.peak_allocated_bytes for run in cell.values()] for config, cell in cells.items()}
    if any(None in values for values in peaks.values()):
        return NOT_DECIDED, "its memory on a GPU was not measured"
    if any(shares_process(run) for cell in cells.values() for run in cell.values()):
        return NOT_DECIDED, "its peak memory is not known, since its runs shared a process with others"
    least = min(rivals, key=lambda config: max(peaks[config]))
    words = f"it needs {gigabytes(max(peaks[CONFIG]))}, the leanest rival ({least}) {gigabytes(max(peaks[least]))}"
    if len(ours) < FEWEST_SEEDS:
        return NOT_DECIDED, words
    return (SUPPORTED if max(peaks[CONFIG]) <= MEMORY_TOLERANCE * max(peaks[least]) else REFUTED), words
