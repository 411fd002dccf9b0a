"""Which MFU is drawn: against the card's bf16 peak, or on a CPU against the measured matmul rate."""

from __future__ import annotations

from collections.abc import Iterable

from instrument.results.schemas import RunRecord

BF16, MEASURED, TOKENS = "bf16 peak", "measured peak", "tokens/s"
FIELD = {BF16: "mfu_bf16_peak", MEASURED: "mfu_measured_peak"}
NOT_MEASURED = (
    "not measured: no run of this folder has an MFU (a GPU that is not in the table of peaks, or a machine "
    "without measured ceilings; see `python -m harness doctor --measure`)"
)


def y_kind(runs: Iterable[RunRecord]) -> str | None:
    """The denominator that these runs have in common, or None when no MFU was measured."""
    runs = list(runs)
    return next((kind for kind, field in FIELD.items() if any(getattr(run, field) is not None for run in runs)), None)
