"""Everything that a run's files say about its end, as plain data: the verdict, where in the code it failed, how far values
stayed from the ends of dtypes. Torch-free."""

from __future__ import annotations

import math
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from harness.failure import FORENSICS_ERRORS
from instrument.results.files import plain_inside
from instrument.results.layout import TRACES, RunFiles
from instrument.results.measurements import ForensicsRecord, Magnitude
from instrument.results.read import failure_of, records, run_record
from instrument.results.schemas import KIND_NAMES, FirstNonfinite, RunRecord
from instrument.terminal import count
from kernels.float_formats import FP16, float_format

MOST_FRAMES = 5
FRAME = re.compile(
    r'^[ |]*File "(?P<file>[^"\n]+)", line (?P<line>\d+),? in (?P<function>[^\n]+)'
    r'(?:\n(?![ |]*File ")[ |]*(?P<code>\S[^\n]*))?',
    re.MULTILINE,
)
"""A frame of a traceback, with its line of code, or of a dump by `faulthandler`, without."""
LIBRARY = re.compile(r"[/\\](?:site|dist)-packages[/\\]|^<")
BETWEEN = re.compile(r"\n\n(?:During handling of the above|The above exception was)[^\n]*\n\n")
ROOT = Path(__file__).resolve().parents[2]
UNFINISHED = "unfinished"
RUN_FIELDS = (
    *("case", "dtype_config", "seed", "preset", "device", "max_steps", "divergence_step"),
    *("scaler_skips", "instrument", "attention_backend", "first_nonfinite", "error"),
)


def gather(run: RunFiles) -> dict[str, Any]:
    """Read the run and say what became of it; raises `RunUnreadable` for files that break their schema."""
    record = run_record(run)
    forensics = failure_of(run, record)
    events = records(run, "events")
    steps = record.steps_done if record else len(records(run, "steps"))
    modules = records(run, "activations")
    found = {
        "run_id": run.run_id,
        "results_folder": str(run.out),
        "status": record.status if record else UNFINISHED,
        "steps_done": steps,
        **({name: getattr(record, name) for name in RUN_FIELDS} if record else {}),
        "device_type": record.config.get("device") if record else None,
        "events": msgspec.to_builtins(events),
        "smallest_headroom": smallest_headroom(modules),
        "weights_file": str(run.weights) if run.weights.is_file() else None,
    }
    if (stack := stack_of(run, record)) is not None:
        found["stack"] = stack
    if forensics is not None:
        found |= {name: value for name, value in msgspec.to_builtins(forensics).items() if name not in ("schema", "nonfinite")}
        found["trace_file"] = _trace(run, forensics.trace_file)
        found["earlier_history"] = earlier_history(modules, forensics.history)
        found["repro_kept"] = run.culprit.is_file()
    return found | {"verdict": verdict(record, forensics, steps)}


def stack_of(run: RunFiles, record: RunRecord | None) -> dict[str, Any] | None:
    """``frames``, outermost first: at most `MOST_FRAMES` of the project's or the model's own code, and the one that failed
    when it is a library's; ``whole``: where all of them are. None where the row has no stack."""
    if record is None:
        return None
    death = record.flags.get("death")
    dumped = death.get("stack") if isinstance(death, dict) else None
    if isinstance(traceback := record.flags.get("traceback"), str):
        frames, whole = _frames(_block(traceback, record.error or "")), f"flags.traceback in {run.row}"
    elif isinstance(dumped, list) and all(isinstance(line, str) for line in dumped):
        frames, whole = _frames("\n".join(reversed(dumped))), str(run.output)  # a dump is innermost first
    else:
        return None
    own = [frame for frame in frames[:-1] if not _is_a_librarys(frame["file"])][-MOST_FRAMES:] + frames[-1:]
    return {"frames": own, "whole": whole} if own else None


def _block(traceback: str, error: str) -> str:
    """Of a chain of exceptions the one that the row speaks of, else the last."""
    blocks = BETWEEN.split(traceback)
    return next((block for block in blocks if error and error in block), blocks[-1])


def _frames(text: str) -> list[dict[str, Any]]:
    return [{**found.groupdict(), "file": _short(found["file"]), "line": int(found["line"])} for found in FRAME.finditer(text)]


def _short(file: str) -> str:
    """The project's own files as they are called in it."""
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file


def _is_a_librarys(file: str) -> bool:
    standard = Path(sysconfig.get_paths()["stdlib"])
    return LIBRARY.search(file) is not None or Path(file).is_relative_to(standard)


def smallest_headroom(modules: Sequence) -> dict[str, dict[str, Any]] | None:
    """The values that came nearest to the end of ``own_dtype`` and of ``float16``, whatever they were stored in."""
    measured = [row for row in modules if row.absmax and 0 < row.absmax < math.inf and float_format(row.dtype)]
    if not measured:
        return None

    def nearest(format_of) -> dict[str, Any]:
        row = min(measured, key=lambda r: format_of(r).max / r.absmax)
        what = {name: getattr(row, name) for name in ("module", "direction", "dtype", "absmax")}
        return what | {"step": row.absmax_step, "headroom_bits": format_of(row).headroom_bits(row.absmax)}

    return {"own_dtype": nearest(lambda row: float_format(row.dtype)), "float16": nearest(lambda row: FP16)}


def earlier_history(modules: Sequence, history: Sequence[Magnitude]) -> list[dict[str, Any]]:
    """What the run itself logged of the culprit's module before the replayed steps: the largest |x| of a window, at
    its step."""
    if not history:
        return []
    mine = [row for row in modules if row.module == history[0].module and row.absmax_step < history[0].step]
    unknown = {"absmax_fwd": None, "absmax_bwd": None}
    return [
        {"step": row.absmax_step, "module": row.module} | unknown | {f"absmax_{row.direction}": row.absmax}
        for row in sorted(mine, key=lambda r: r.absmax_step)
    ]


def verdict(record: RunRecord | None, found: ForensicsRecord | None, steps: int) -> str:
    """The outcome in one sentence."""
    if record is None:
        return f"no end was written: it is still running or was killed, {count(steps, 'step')} logged so far"
    if found is not None:
        return found.sentence
    if record.status == "completed":
        skipped = count(record.scaler_skips, "step") if record.scaler_skips else "no step"
        scaler = f"; the loss scaler skipped {skipped}" if record.config.get("config", {}).get("scaler") else ""
        if record.stalled is not None:
            return f"completed, but stalled: {record.stalled} of {count(steps, 'step')}{scaler}"
        return f"healthy: {count(steps, 'step')}, every loss, gradient that was applied, parameter and state finite{scaler}"
    if record.status == "diverged" and record.first_nonfinite is not None:
        failed = record.flags.get(FORENSICS_ERRORS)
        reasons = "; ".join(f"{part}: {why}" for part, why in failed.items()) if isinstance(failed, dict) else ""
        why = f"its forensics failed ({reasons})" if reasons else f"instrument level {record.instrument}"
        return f"{surfaced(record.first_nonfinite)}; the failure was not replayed: {why}"
    return f"{record.status} after {count(steps, 'step')}" + (f": {record.error}" if record.error else "")


def surfaced(first: FirstNonfinite) -> str:
    """Where a failure surfaced, without a replay."""
    rank = f", rank {first.rank}" if first.rank is not None else ""
    micro = f", micro-batch {first.microbatch}" if first.microbatch is not None else ""
    module = f"{first.module}, " if first.module else ""
    dtype = f" in {first.dtype}" if first.dtype else ""
    phase = "after the update" if first.phase == "after" else first.phase
    return f"step {first.step}{rank}{micro}, {phase}, {module}{first.tensor} is {KIND_NAMES[first.kind]}{dtype}"


def _trace(run: RunFiles, name: str | None) -> str | None:
    path = run.out / TRACES / name if name else None
    return str(path) if path is not None and plain_inside(run.out, path) else None
