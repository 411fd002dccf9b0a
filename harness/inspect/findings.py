"""Everything that a run's files say about its end, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from harness.inspect.locate import FoundRun
from harness.inspect.run_files import failure_of, module_rows, records, run_record
from harness.inspect.stack import stack_of
from instrument.count import count
from instrument.files import plain_inside
from instrument.forensics_record import ForensicsRecord, Magnitude
from instrument.records import EventRecord, FirstNonfinite, RunRecord, StepRecord

UNFINISHED = "unfinished"
LIMITS = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
RUN_FIELDS = (
    "case",
    "dtype_config",
    "seed",
    "preset",
    "device",
    "max_steps",
    "divergence_step",
    "scaler_skips",
    "instrument",
    "attention_backend",
    "first_nonfinite",
    "error",
)
KIND_WORDS = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}


def gather(run: FoundRun) -> dict[str, Any]:
    """Read the run and say what became of it; raises `RunUnreadable` for files that break their schema."""
    record = run_record(run)
    forensics = failure_of(run, record)
    events = records(run.path / "events.jsonl", EventRecord)
    steps = record.steps_done if record else len(records(run.steps_file, StepRecord))
    modules = module_rows(run)
    found = {
        "run_id": run.run_id,
        "results_folder": str(run.out),
        "status": record.status if record else UNFINISHED,
        "steps_done": steps,
        **({name: getattr(record, name) for name in RUN_FIELDS} if record else {}),
        "device_type": record.config.get("device") if record else None,
        "events": msgspec.to_builtins(events),
        "smallest_headroom": smallest_headroom(modules),
    }
    if (stack := stack_of(run, record)) is not None:
        found["stack"] = stack
    if forensics is not None:
        found |= {name: value for name, value in msgspec.to_builtins(forensics).items() if name not in ("schema", "nonfinite")}
        found["trace_file"] = _trace(run, forensics.trace_file)
        found["earlier_history"] = earlier_history(modules, forensics.history)
        found["repro_kept"] = (run.path / "culprit.safetensors").is_file()
    return found | {"verdict": verdict(run, record, forensics, steps, found["smallest_headroom"])}


def smallest_headroom(modules: Sequence) -> dict[str, dict[str, Any]] | None:
    """The values that came nearest to the end of ``own_dtype`` and of ``float16``, whatever they were stored in."""
    measured = [row for row in modules if row.absmax and row.dtype in LIMITS]
    if not measured:
        return None

    def nearest(limit_of) -> dict[str, Any]:
        row = min(measured, key=lambda r: limit_of(r) / r.absmax)
        return {
            "module": row.module,
            "direction": row.direction,
            "dtype": row.dtype,
            "absmax": row.absmax,
            "step": row.absmax_step,
            "headroom_bits": math.log2(limit_of(row) / row.absmax),
        }

    return {"own_dtype": nearest(lambda row: LIMITS[row.dtype]), "float16": nearest(lambda row: LIMITS["float16"])}


def earlier_history(modules: Sequence, history: Sequence[Magnitude]) -> list[dict[str, Any]]:
    """What the run itself logged of the culprit's module before the replayed steps: the largest |x| of a window, at
    its step."""
    if not history:
        return []
    mine = [row for row in modules if row.module == history[0].module and row.absmax_step < history[0].step]
    return [
        {
            "step": row.absmax_step,
            "module": row.module,
            "absmax_fwd": row.absmax if row.direction == "fwd" else None,
            "absmax_bwd": row.absmax if row.direction == "bwd" else None,
        }
        for row in sorted(mine, key=lambda r: r.absmax_step)
    ]


def verdict(
    run: FoundRun,
    record: RunRecord | None,
    found: ForensicsRecord | None,
    steps: int,
    headroom: dict[str, dict[str, Any]] | None,
) -> str:
    """The outcome in one sentence."""
    if record is None:
        return f"no end was written: it is still running or was killed, {count(steps, 'step')} logged so far"
    if found is not None:
        return found.sentence
    if record.status == "completed":
        skips = record.scaler_skips
        skipped = count(skips, "step") if skips else "no step"
        scaler = f"; the loss scaler skipped {skipped}" if record.config.get("config", {}).get("scaler") else ""
        return f"healthy: {count(steps, 'step')}, every loss, gradient that was applied, parameter and state finite{scaler}"
    if record.status == "diverged" and record.first_nonfinite is not None:
        return f"{surfaced_words(record.first_nonfinite)}; the failure was not replayed (instrument level {record.instrument})"
    return f"{record.status} after {count(steps, 'step')}" + (f": {record.error}" if record.error else "")


def surfaced_words(first: FirstNonfinite) -> str:
    """Where a failure surfaced, without a replay."""
    micro = f", rank {first.rank}" if first.rank is not None else ""
    micro += f", micro-batch {first.microbatch}" if first.microbatch is not None else ""
    module = f"{first.module}, " if first.module else ""
    dtype = f" in {first.dtype}" if first.dtype else ""
    return f"step {first.step}{micro}, {first.phase}, {module}{first.tensor} is {KIND_WORDS[first.kind]}{dtype}"


def _trace(run: FoundRun, name: str | None) -> str | None:
    path = run.out / "traces" / name if name else None
    return str(path) if path is not None and plain_inside(run.out, path) else None
