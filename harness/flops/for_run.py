"""What a run needs to fill in its FLOPs and MFU: made once before its first step, outside of all timing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from bench_cases.models import ModelRequest
from harness.doctor.measured import rates_measured_here
from harness.flops.model import meaningful_outputs, step_flops
from harness.settings import RunSettings
from instrument.flops.counter import Uncountable
from instrument.mfu import Peaks, Utilisation, datasheet_peaks


def utilisation(
    settings: RunSettings,
    model: nn.Module,
    request: ModelRequest,
    machine: Mapping[str, object],
    out: Path,
    *,
    attention: str,
    threads: int,
) -> Utilisation:
    """The run's `Utilisation`. ``model`` may be prepared already or not, but not compiled; ``machine`` is
    `instrument.environment.capture`'s; ``attention`` the SDPA backend and ``threads`` what torch uses on a CPU;
    ``out`` the results folder, whose ``machine.json`` may hold measured rates."""
    rates, remark = rates_measured_here(out, machine, None if settings.device == "cuda" else threads)
    peaks = Peaks(
        **datasheet_peaks(machine.get("gpu")),
        measured=rates,
        measured_remark=remark if rates else None,
        measured_unknown=None if rates else remark,
    )
    peaks = peaks.of_many(settings.world)
    try:
        flops = step_flops(
            model,
            settings.case,
            settings.config,
            attention=attention,
            outputs=meaningful_outputs(request),
            seq_len=settings.seq_len,
        )
    except Uncountable as error:
        return Utilisation(None, peaks, not_counted=str(error))
    return Utilisation(flops, peaks)
