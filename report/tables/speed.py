"""Which runs' speed and memory count, and against which peak."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.judgement import divergence_text
from report.tables.selection import Selection
from report.text import number

FEWEST_STEPS = 50
FEWEST_STEPS_TINY = 10
SATURATED_PERCENT, LEAST_SHARE_PERCENT = 95.0, 80.0
"""Of a machine, and of a core for each thread: a run on a busy processor that had less than this was slowed by others."""
BF16, MEASURED, TOKENS = "bf16 peak", "measured peak", "tokens/s"
FIELD = {BF16: "mfu_bf16_peak", MEASURED: "mfu_measured_peak"}
NOT_MEASURED = (
    "not measured: no run of this folder has an MFU (a GPU that is not in the table of peaks, or a machine "
    "without measured ceilings; see `python -m harness doctor --measure`)"
)


def eligible(folder: Folder, selection: Selection) -> tuple[list[RunRecord], tuple[tuple[str, str], ...]]:
    """The runs that may enter, and the others with their reasons (with those the selection left out)."""
    reasons = {run.run_id: ineligible_reason(folder, run) for run in selection.runs}
    left_out = tuple((run_id, reason) for run_id, reason in reasons.items() if reason is not None)
    return [run for run in selection.runs if reasons[run.run_id] is None], selection.excluded + left_out


def ineligible_reason(folder: Folder, run: RunRecord) -> str | None:
    """Why a run's speed does not count, or None."""
    if run.status == "diverged":
        return divergence_text(run)
    if run.status != "completed":
        return run.status
    if not run.samples_per_s or run.samples_per_s <= 0:
        return "no step was timed"
    needed = FEWEST_STEPS_TINY if run.preset == "tiny" else FEWEST_STEPS
    found = int(timed(folder, run).sum())
    if found < needed:
        return f"{found} timed, finite steps after warm-up, and {needed} are needed"
    return disturbed(run)


def timed(folder: Folder, run: RunRecord) -> np.ndarray:
    """Which steps of a run count for speed: after the untimed ones, with a finite time and loss."""
    columns = folder.steps(run.run_id)
    return (columns["step"] > untimed_steps(run)) & np.isfinite(columns["step_time_s"]) & np.isfinite(columns["loss"])


def untimed_steps(run: RunRecord) -> int:
    """Steps at the start that no speed counts (allocation, kernel selection, compilation)."""
    given = run.config.get("untimed_steps")
    return given if isinstance(given, int) else run.steps_done - run.timed_steps


def disturbed(run: RunRecord) -> str | None:
    """Whether the device throttled or was shared with others; None where it was not, and where nobody knows."""
    found = disturbances(run)
    if found["throttled"]:
        reasons = _hardware(run).get("throttle_reasons")
        return "throttled" + (f": {', '.join(map(str, reasons))}" if isinstance(reasons, list) and reasons else "")
    if not found["contended"]:
        return None
    busy, own, threads = _cpu(run)
    if _hardware(run).get("contended"):
        return "contended: another process used the GPU"
    return (
        f"contended: the machine's CPU was at {busy:.0f} % and the run had {own / 100:.2f} cores for {count(threads, 'thread')}"
    )


def disturbances(run: RunRecord) -> dict[str, bool | None]:
    """``throttled`` and ``contended``: true, false, or None where ``flags["hardware"]`` does not say. A run on the processor
    was contended when the whole machine was busy and it had less of it than its threads could use."""
    hardware = _hardware(run)
    found = {name: value if isinstance(value := hardware.get(name), bool) else None for name in ("throttled", "contended")}
    busy, own, threads = _cpu(run)
    if found["contended"] is None and run.config.get("device") == "cpu" and busy is not None and own is not None:
        found["contended"] = busy >= SATURATED_PERCENT and own < LEAST_SHARE_PERCENT * threads
    return found


def _hardware(run: RunRecord) -> dict[str, Any]:
    hardware = run.flags.get("hardware")
    return hardware if isinstance(hardware, dict) else {}


def _cpu(run: RunRecord) -> tuple[float | None, float | None, int]:
    """Medians of the machine's use (100 %: all of it) and of the run's (100 %: one core), and its threads."""
    hardware, switches = _hardware(run), run.flags.get("switches")
    threads = run.config.get("threads") or (switches.get("threads") if isinstance(switches, dict) else None)
    busy, own = (number(hardware.get(f"{whose}_cpu_percent_median")) for whose in ("system", "process"))
    return busy, own, threads if isinstance(threads, int) and not isinstance(threads, bool) and threads > 0 else 1


def y_kind(runs: Iterable[RunRecord]) -> str | None:
    """The denominator that these runs have in common, or None when no MFU was measured."""
    runs = list(runs)
    return next((kind for kind, field in FIELD.items() if any(getattr(run, field) is not None for run in runs)), None)


def pooled_rate(rates: list[float]) -> float:
    """The rate of runs that did the same work each: total over total, the harmonic mean."""
    return len(rates) / sum(1 / rate for rate in rates)
