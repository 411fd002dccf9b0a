"""Whether two rows may be compared: same weights, same batches, same switches, same machine."""

from __future__ import annotations

from bench_cases import DTYPE_CONFIGS
from instrument.results.schemas import RunRecord

HASHES = {"init_sha256": "initial weights", "data_sha256": "batches"}
MACHINE = {"gpu": "GPU", "torch_version": "torch", "cuda_version": "CUDA"}


def unfair(run: RunRecord, reference: RunRecord) -> str | None:
    """Why a row must not be compared with its reference, or None. A hash that neither row has is
    no reason (imported logs have none); one that only one of them has is."""
    for field, what in HASHES.items():
        if getattr(run, field) != getattr(reference, field):
            return f"{what} differ from those of {reference.run_id}"
    if run.attention_backend != reference.attention_backend:
        return f"attention backend {run.attention_backend} against {reference.attention_backend} of {reference.run_id}"
    for name, (ours, theirs) in _switches(run, reference).items():
        if ours != theirs:
            return f"switch {name} is {ours}, and {theirs} in {reference.run_id}"
    for field, what in MACHINE.items():
        if run.env.get(field) != reference.env.get(field):
            return f"{what} {run.env.get(field)} against {reference.env.get(field)} of {reference.run_id}"
    return None


def _switches(run: RunRecord, reference: RunRecord) -> dict[str, tuple[object, object]]:
    """Global switches of both rows. TF32 is left out where a configuration is about it, and what
    was verified differs by what a configuration needs."""
    ours, theirs = run.flags.get("switches") or {}, reference.flags.get("switches") or {}
    about_tf32 = any(config.tf32 for row in (run, reference) if (config := DTYPE_CONFIGS.get(row.dtype_config)))
    left_out = {"verified", *(["fp32_precision"] if about_tf32 else [])}
    return {name: (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs} - left_out)}
