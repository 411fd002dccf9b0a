"""Whether something slowed a run's GPU down, in words. Torch-free."""

from __future__ import annotations

from instrument.records import RunRecord


def disturbance(record: RunRecord) -> str | None:
    """What ``flags["hardware"]`` says of heat and of other processes; None where there was nothing, or nobody knows."""
    hardware = record.flags.get("hardware")
    if not isinstance(hardware, dict):
        return None
    words = []
    if hardware.get("throttled"):
        words.append(f"the GPU slowed itself down ({', '.join(hardware.get('throttle_reasons') or [])})")
    if hardware.get("contended"):
        words.append("another process was on the GPU")
    return f"{'; '.join(words)}: the report leaves this run out of the figures of speed" if words else None
